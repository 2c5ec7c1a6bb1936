"""PREFERENCES: every way to weigh the tokens of a pair as one entry of one table."""

from __future__ import annotations

import math

from tokencredit.credit import Amplify, Chain, LengthMean, Outcome, ProxyWeight, Tilt, TopFraction
from tokencredit.methods import Methods
from tokencredit.preference.links import Logistic
from tokencredit.preference.method import PreferenceMethod

PREFERENCES = Methods(
    (method.name, method)
    for method in (
        PreferenceMethod(
            "dpo",
            Chain(Outcome()),
            summary="every token of a completion weighs the same",
            source="DPO, arXiv:2305.18290 eq. 7",
        ),
        PreferenceMethod(
            "dpo_entropy",
            Chain(Outcome(), ProxyWeight("entropy", "mean_one", "group")),
            summary="tokens weighted by the reference's entropy, mean one over the pair",
            source="defined here: no published method of this form was found; min-max weights would change β's meaning",
        ),
        PreferenceMethod(
            "dpo_forking",
            Chain(Outcome(), TopFraction("entropy", 0.2, "row")),
            summary="only the fifth of each completion where the reference is least sure",
            source="defined here: the 80/20 rule, arXiv:2506.01939, for pairs",
        ),
        PreferenceMethod(
            "sepo",
            Chain(Outcome(), TopFraction("implicit_reward", 0.3, "row", by_outcome=True), LengthMean()),
            beta=2.0,
            reference_free=True,
            summary="the tokens that a weak DPO policy rewards most among the chosen, least among the rejected",
            source="SePO, arXiv:2408.13518, from others' notes; β is not theirs",
            fidelity="reconstructed",
        ),
        PreferenceMethod(
            "tgdpo",
            Chain(Outcome(), Amplify("implicit_reward", 0.05, 0.05, floor=-math.inf)),
            summary="tokens weighted by the implicit reward of another DPO policy, the other way round when rejected",
            source="TGDPO, arXiv:2506.14574, released code: α = 0.5 times its β = 0.1; weights may be negative",
            fidelity="code",
        ),
        PreferenceMethod(
            "tis_dpo",
            Chain(Outcome(), Tilt("contrast", -0.5, 1.5)),
            summary="tokens weighted by the ratio of a policy of what is chosen to one of what is rejected",
            source="TIS-DPO, arXiv:2410.04350; the released default has all weights 1, and leaves out the last token",
            fidelity="reconstructed",
        ),
        PreferenceMethod(
            "simpo",
            Chain(Outcome(), LengthMean()),
            Logistic(gamma=1.0),
            beta=2.0,
            reference_free=True,
            summary="mean log-probs without a reference, and a margin between them",
            source="SimPO, arXiv:2405.14734, form as commonly given; β and γ vary by model",
            fidelity="reconstructed",
        ),
        PreferenceMethod(
            "dpo_pivotal",
            Chain(Outcome(), Amplify("before_after", 1.0, 1.0, base=0.0)),
            summary="tokens weighted by their measured effect, where it agrees with the side they are on",
            source="defined here: pivotal token search, phi-4 (arXiv:2412.08905), as weights, not one-token pairs",
        ),
    )
)
