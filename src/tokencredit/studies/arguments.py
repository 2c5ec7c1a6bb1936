"""What every question about an update is asked with: which run and checkpoint, how many rollouts, which method and
optimizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokencredit.lm.arguments import add_policy, policy_config

OPTIMIZERS = ("adamw", "sgd")


def add_common(
    parser: argparse.ArgumentParser, *, out: str, prompts: int = 64, group: int = 8, optimizer: bool = True
) -> None:
    """The shared flags; `out`, `prompts` and `group` are the command's own defaults, `optimizer` whether its step is
    asked about.
    """
    add_policy(parser, model=("--run", "--model"))
    parser.add_argument(
        "--checkpoint", type=int, metavar="N", help="its checkpoint of optimizer step N (default: the last one)"
    )
    parser.add_argument("--method", help="a name that `tokencredit methods` lists (default: the run's own)")
    if optimizer:
        parser.add_argument("--optimizer", choices=OPTIMIZERS, help="a fresh optimizer in place of the checkpoint's")
    else:
        parser.set_defaults(optimizer=None)
    parser.add_argument("--prompts", type=int, default=prompts, help="prompts of the batch (default: %(default)s)")
    parser.add_argument("--group", type=int, default=group, help="rollouts of every prompt (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of prompts, sampling and resampling (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="directory of the figures and the page (default: %(default)s)"
    )


def open_from(asked: Any, **options: Any) -> Any:
    """The checkpoint that arguments name, or a study's config by its `policy`, with the method and the optimizer that
    they ask for; `options` as of `open_checkpoint`.
    """
    from tokencredit.dynamics.checkpoint import open_checkpoint

    policy = policy_config(asked) if isinstance(asked, argparse.Namespace) else asked.policy
    checkpoint = open_checkpoint(policy, asked.checkpoint, method=asked.method, **options)
    return checkpoint.fresh(asked.optimizer) if asked.optimizer else checkpoint
