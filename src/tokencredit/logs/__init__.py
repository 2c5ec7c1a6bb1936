"""Rollouts that any trainer logged, read without loss: files -> `LoggedRollout`."""

from tokencredit.logs.rollout import LoggedRollout

__all__ = ["LoggedRollout"]
