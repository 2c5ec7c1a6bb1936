"""tokencredit: which tokens deserve the credit?

    rollouts = tokencredit.Rollouts(reward=reward, group=group, mask=mask, scores={"entropy": entropy})
    method = tokencredit.METHODS["gtpo"]
    credit = method.credit(rollouts)
    loss, stats = method.loss(logprob=logprob, old_logprob=old_logprob, credit=credit, rollouts=rollouts)

Importing this needs torch alone; models, tasks, engines and reports are imported from their own modules.
"""

from tokencredit.credit import Chain, Transform
from tokencredit.methods import METHODS, Method, Plan
from tokencredit.rollouts import Rollouts

__version__ = "0.1.0"
__all__ = ["METHODS", "Chain", "Method", "Plan", "Rollouts", "Transform", "__version__"]
