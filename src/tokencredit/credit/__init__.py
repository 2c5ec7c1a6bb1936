"""Credit: reward -> credit [B, T]. Pure functions on torch tensors, no gradients."""

from tokencredit.credit.baselines import (
    BatchWhiten,
    GroupCenter,
    LeaveOneOut,
    OptimalTokenBaseline,
    Outcome,
    PolarityCenter,
)
from tokencredit.credit.sampling import TokenSampling
from tokencredit.credit.shaping import EntropyReward, GroupRelativeOverlong, Overlong
from tokencredit.credit.transform import LAWS, Chain, Transform
from tokencredit.credit.weights import Above, EntropyBonus, ProxyWeight, Score, TopFraction, Weight

__all__ = [
    "LAWS",
    "Above",
    "BatchWhiten",
    "Chain",
    "EntropyBonus",
    "EntropyReward",
    "GroupCenter",
    "GroupRelativeOverlong",
    "LeaveOneOut",
    "OptimalTokenBaseline",
    "Outcome",
    "Overlong",
    "PolarityCenter",
    "ProxyWeight",
    "Score",
    "TokenSampling",
    "TopFraction",
    "Transform",
    "Weight",
]
