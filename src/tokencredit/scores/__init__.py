"""Scores of tokens: which there are, what each is, and who measures it. The only place that knows."""

from tokencredit.scores.table import SCORES, ScoreKind, available

__all__ = ["SCORES", "ScoreKind", "available"]
