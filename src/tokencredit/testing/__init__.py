"""What every transform and method must keep, checked on random batches: for the parts of this library and for your own.

    check_laws(MyTransform(0.5))                                   # AssertionError names the law that is broken
    check_method(METHODS["gtpo"].replace(chain=Chain(Outcome(), MyTransform(0.5))))
    @given(rollouts_strategy(("entropy",)))                        # ragged batches, NaN padding, degenerate groups

`PLANTED` holds one small wrong part for every law, which that law must catch: a check that cannot fail proves nothing.
"""

from tokencredit.testing.batches import credit_like, logprobs_like, rollouts_strategy
from tokencredit.testing.laws import UNIVERSAL, check_laws
from tokencredit.testing.loss_laws import METHOD_LAWS, check_method
from tokencredit.testing.planted import PLANTED, planted_method

__all__ = [
    "METHOD_LAWS",
    "PLANTED",
    "UNIVERSAL",
    "check_laws",
    "check_method",
    "credit_like",
    "logprobs_like",
    "planted_method",
    "rollouts_strategy",
]
