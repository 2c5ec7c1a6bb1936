"""Credit: reward -> credit [B, T]. Pure functions on torch tensors, no gradients."""

from tokencredit.credit.baselines import (
    BatchWhiten,
    ColumnCenter,
    GroupCenter,
    LeaveOneOut,
    OptimalTokenBaseline,
    Outcome,
    PolarityCenter,
    TokenLeaveOneOut,
)
from tokencredit.credit.bonuses import ConfidenceBonus, EntropyBonus, EntropyGradient
from tokencredit.credit.by_sign import Amplify, Tilt
from tokencredit.credit.sampling import TokenSampling
from tokencredit.credit.shaping import EntropyReward, GroupRelativeOverlong, Overlong
from tokencredit.credit.to_go import Redistribute, Returns, ToGo, TokenReward
from tokencredit.credit.transform import LAWS, Chain, Sum, Transform
from tokencredit.credit.weights import (
    Above,
    Below,
    BoundCredit,
    GroupWeight,
    LengthMean,
    ProxyWeight,
    Score,
    TopFraction,
    Weight,
)

__all__ = [
    "LAWS",
    "Above",
    "Amplify",
    "BatchWhiten",
    "Below",
    "BoundCredit",
    "Chain",
    "ColumnCenter",
    "ConfidenceBonus",
    "EntropyBonus",
    "EntropyGradient",
    "EntropyReward",
    "GroupCenter",
    "GroupRelativeOverlong",
    "GroupWeight",
    "LeaveOneOut",
    "LengthMean",
    "OptimalTokenBaseline",
    "Outcome",
    "Overlong",
    "PolarityCenter",
    "ProxyWeight",
    "Redistribute",
    "Returns",
    "Score",
    "Sum",
    "Tilt",
    "ToGo",
    "TokenLeaveOneOut",
    "TokenReward",
    "TokenSampling",
    "TopFraction",
    "Transform",
    "Weight",
]
