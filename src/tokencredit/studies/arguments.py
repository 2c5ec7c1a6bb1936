"""What every question about an update is asked with: which run and checkpoint, how many rollouts, which method and
optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tokencredit.studies.options import option

if TYPE_CHECKING:
    from tokencredit.lm.policy import PolicyConfig


def default_policy() -> PolicyConfig:
    """The shipped model on the embedded world; a model library is imported when it is asked for, not before."""
    from tokencredit.lm.policy import PolicyConfig

    return PolicyConfig()


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """A question about a policy, which the arguments that all commands share name."""

    policy: PolicyConfig = field(default_factory=default_policy)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(OnPolicy):
    """A checkpoint of a run, or a model, and the rollouts that are asked about."""

    checkpoint: int | None = option(None, "its checkpoint of optimizer step N (default: the last one)", metavar="N")
    method: str | None = option(None, "a name that `tokencredit methods` lists (default: the run's own)")
    prompts: int = option(64, "prompts of the batch")
    group: int = option(8, "rollouts of every prompt")
    seed: int = option(0, "of prompts, sampling and resampling (default: 0)")


@dataclass(frozen=True, kw_only=True)
class StepConfig(CheckpointConfig):
    """The step that its optimizer makes, or that a fresh one would."""

    optimizer: Literal["adamw", "sgd"] | None = option(None, "a fresh optimizer in place of the checkpoint's")


def open_from(config: CheckpointConfig, **options: Any) -> Any:
    """The checkpoint that a configuration names, with the method and the optimizer that it asks for; `options` as of
    `open_checkpoint`.
    """
    from tokencredit.dynamics.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(config.policy, config.checkpoint, method=config.method, **options)
    fresh = config.optimizer if isinstance(config, StepConfig) else None
    return checkpoint.fresh(fresh) if fresh else checkpoint
