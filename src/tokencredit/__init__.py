"""tokencredit: which tokens deserve the credit?

    rollouts = tokencredit.Rollouts(reward=reward, group=group, mask=mask, scores={"entropy": entropy})
    method = tokencredit.METHODS["gtpo"]
    credit = method.credit(rollouts)
    loss, stats = method.loss(logprob=logprob, old_logprob=old_logprob, credit=credit, rollouts=rollouts)

Names are imported when they are first used. The algebra (rollouts, transforms, surrogates, aggregates, methods) needs
torch alone; `check_laws` and `check_method` need hypothesis, `importance` transformers, `CreditTrainer` and
`RunRecorder` TRL. Tasks, pivotality, dynamics, studies and reports have modules of their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.credit import (
        LAWS,
        Above,
        Amplify,
        BatchWhiten,
        Below,
        BoundCredit,
        Chain,
        ColumnCenter,
        ConfidenceBonus,
        EntropyBonus,
        EntropyGradient,
        EntropyReward,
        GroupCenter,
        GroupRelativeOverlong,
        GroupWeight,
        LeaveOneOut,
        LengthMean,
        OptimalTokenBaseline,
        Outcome,
        Overlong,
        PolarityCenter,
        ProxyWeight,
        Redistribute,
        Returns,
        Score,
        Sum,
        Tilt,
        ToGo,
        TokenLeaveOneOut,
        TokenReward,
        TokenSampling,
        TopFraction,
        Transform,
        Weight,
    )
    from tokencredit.engines.recorder import RunRecorder
    from tokencredit.engines.trl import CreditTrainer
    from tokencredit.engines.trl_preference import PreferenceTrainer
    from tokencredit.lm.proxies import Importance, importance
    from tokencredit.method import Method, Plan, parse
    from tokencredit.methods import METHODS
    from tokencredit.objective import (
        CISPO,
        GPPO,
        SAPO,
        Aggregate,
        Clip,
        ClipCov,
        HybridClip,
        KLCov,
        LogProb,
        LowEntropyKL,
        SelectedMean,
        SequenceClip,
        SequenceMean,
        SequenceSum,
        Surrogate,
        TokenMean,
    )
    from tokencredit.preference import PREFERENCES
    from tokencredit.report.notebook import TokenView
    from tokencredit.rollouts import Rollouts
    from tokencredit.silence import why_no_credit
    from tokencredit.testing import check_laws, check_method

__version__ = "0.1.0"
__all__ = [
    "CISPO",
    "GPPO",
    "LAWS",
    "METHODS",
    "PREFERENCES",
    "SAPO",
    "Above",
    "Aggregate",
    "Amplify",
    "BatchWhiten",
    "Below",
    "BoundCredit",
    "Chain",
    "Clip",
    "ClipCov",
    "ColumnCenter",
    "ConfidenceBonus",
    "CreditTrainer",
    "EntropyBonus",
    "EntropyGradient",
    "EntropyReward",
    "GroupCenter",
    "GroupRelativeOverlong",
    "GroupWeight",
    "HybridClip",
    "Importance",
    "KLCov",
    "LeaveOneOut",
    "LengthMean",
    "LogProb",
    "LowEntropyKL",
    "Method",
    "OptimalTokenBaseline",
    "Outcome",
    "Overlong",
    "Plan",
    "PolarityCenter",
    "PreferenceTrainer",
    "ProxyWeight",
    "Redistribute",
    "Returns",
    "Rollouts",
    "RunRecorder",
    "Score",
    "SelectedMean",
    "SequenceClip",
    "SequenceMean",
    "SequenceSum",
    "Sum",
    "Surrogate",
    "Tilt",
    "ToGo",
    "TokenLeaveOneOut",
    "TokenMean",
    "TokenReward",
    "TokenSampling",
    "TokenView",
    "TopFraction",
    "Transform",
    "Weight",
    "__version__",
    "check_laws",
    "check_method",
    "importance",
    "parse",
    "why_no_credit",
]

# Where a name lives, if not among the transforms, surrogates and aggregates.
_HOMES = {
    "CreditTrainer": "engines.trl",
    "RunRecorder": "engines.recorder",
    "Importance": "lm.proxies",
    "METHODS": "methods",
    "Method": "method",
    "PREFERENCES": "preference",
    "Plan": "method",
    "PreferenceTrainer": "engines.trl_preference",
    "Rollouts": "rollouts",
    "TokenView": "report.notebook",
    "check_laws": "testing",
    "check_method": "testing",
    "importance": "lm.proxies",
    "parse": "method",
    "why_no_credit": "silence",
}
_MODULES = ("credit", "masked", "method", "methods", "objective", "rollouts", "stats", "testing")

# Hidden from type checkers, which would otherwise take any misspelt name for Any.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"tokencredit.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'tokencredit' has no attribute {name!r}")
        for home in [_HOMES[name]] if name in _HOMES else ("credit", "objective"):
            module = import_module(f"tokencredit.{home}")
            if hasattr(module, name):
                globals()[name] = found = getattr(module, name)
                return found
        raise AttributeError(f"module 'tokencredit' lists {name!r}, but neither credit nor objective has it")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
