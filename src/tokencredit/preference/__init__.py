"""Preference: pairs -> loss, by the same chains of credit. On torch alone."""

from tokencredit.preference.links import Hinge, Link, Logistic, Squared
from tokencredit.preference.method import PreferenceMethod
from tokencredit.preference.pairs import Pairs, behind_common_prefix
from tokencredit.preference.table import PREFERENCES

__all__ = [
    "PREFERENCES",
    "Hinge",
    "Link",
    "Logistic",
    "Pairs",
    "PreferenceMethod",
    "Squared",
    "behind_common_prefix",
]
