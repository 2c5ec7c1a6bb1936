"""Objective: credit -> loss. Surrogates give a loss per token, aggregates weigh the tokens."""

from tokencredit.objective.aggregate import Aggregate, SelectedMean, SequenceMean, SequenceSum, TokenMean
from tokencredit.objective.covariance import ClipCov, KLCov, LowEntropyKL, covariance
from tokencredit.objective.hybrid import HybridClip
from tokencredit.objective.surrogates import CISPO, GPPO, SAPO, Clip, LogProb, SequenceClip, Surrogate

__all__ = [
    "CISPO",
    "GPPO",
    "SAPO",
    "Aggregate",
    "Clip",
    "ClipCov",
    "HybridClip",
    "KLCov",
    "LogProb",
    "LowEntropyKL",
    "SelectedMean",
    "SequenceClip",
    "SequenceMean",
    "SequenceSum",
    "Surrogate",
    "TokenMean",
    "covariance",
]
