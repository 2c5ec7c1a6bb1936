"""Rollouts that any trainer logged, read without loss: files -> `LoggedRollout` -> token ids and `Rollouts`."""

from tokencredit.logs.encoding import Encoded, encode
from tokencredit.logs.formats import FORMATS, Format
from tokencredit.logs.reading import read
from tokencredit.logs.rollout import LoggedRollout

__all__ = ["FORMATS", "Encoded", "Format", "LoggedRollout", "encode", "read"]
