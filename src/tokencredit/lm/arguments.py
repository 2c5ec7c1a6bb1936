"""The command-line arguments that name a policy: the same for every command."""

from __future__ import annotations

import argparse
from typing import Any

from tokencredit.argument_types import size
from tokencredit.settings import read_settings
from tokencredit.tasks.task import Row, Task


def add_policy(
    parser: argparse.ArgumentParser,
    *,
    model: tuple[str, ...] = ("--model",),
    default: str = "reckon, shipped",
    process: str = "the command",
) -> None:
    """Adds --model, --task, --option, --temperature, --max-new-tokens, --chat, --dtype, --device and --memory.

    model     names of the first of them: a command on runs also calls it --run
    default   what is said of it where it is not given
    process   what takes no more than --memory
    """
    group = parser.add_argument_group("policy", "which model on which task; a run's own settings are its defaults")
    group.add_argument(
        *model, dest="model", metavar="MODEL", help=f"a path, hub name or run directory (default: {default})"
    )
    group.add_argument("--task", help="reckon, stories, gsm8k, a .jsonl or .parquet file, or verify.py:function")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        dest="options",
        metavar="K=V",
        help="option of the task, like path=data.jsonl; repeatable",
    )
    group.add_argument("--temperature", type=float, help="of sampling (default: 1)")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="length limit (default: the task's own, at most half of the model's context)",
    )
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="text prompts as a user's message, or as they are (gsm8k makes messages: --option chat=true)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        help="of the weights (default: float32 on a CPU)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    group.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help=f"what {process} may take, weights included, like 4G: it sets how many rows go through the model together"
        " (default: 1.5 GiB beside the weights, less on a small machine; of a GPU half)",
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Adds --sampler and --sampler-option to a command that samples a policy."""
    group = parser.add_argument_group("sampler", "what samples the policy")
    group.add_argument(
        "--sampler",
        choices=("transformers", "vllm"),
        help="vllm is for GPUs and has its own random numbers (default: transformers)",
    )
    group.add_argument(
        "--sampler-option",
        action="append",
        default=[],
        dest="sampler_options",
        metavar="K=V",
        help="field of vllm.LLM, like gpu_memory_utilization=0.6; repeatable",
    )


def policy_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was said, by field of `PolicyConfig`; what was not said is left out."""
    names = ("model", "task", "temperature", "max_new_tokens", "chat", "dtype", "device", "memory", "sampler")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if told := getattr(args, "sampler_options", None):
        given["sampler_options"] = read_settings(told, "--sampler-option")
    return given | ({"options": read_settings(args.options)} if args.options else {})


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was said, by field of `TrainConfig`."""
    given = policy_arguments(args)
    given.pop("memory", None)  # what a process may take is no part of what a run is
    return given | ({"task_options": given.pop("options")} if "options" in given else {})


def policy_config(args: argparse.Namespace) -> Any:
    """The `PolicyConfig` that the arguments name."""
    from tokencredit.lm.policy import PolicyConfig

    return PolicyConfig(**policy_arguments(args))


def rows_of(args: argparse.Namespace, task: Task) -> list[Row]:
    """The rows that --split, --prompts and --seed name; where the part holds fewer than that, it is said."""
    from tokencredit.console import warn

    rows = task.rows(args.split, args.prompts, args.seed)
    if len(rows) < args.prompts:
        told = f"--prompts {args.prompts}: the {args.split} part of {task.name} holds {len(rows)}"
        warn(f"{told}; the rest is --split {'test' if args.split == 'train' else 'train'}")
    return rows
