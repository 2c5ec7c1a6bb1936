"""`tokencredit score`: prompts and completions in, one Parquet row per completion with its tokens' scores out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.console import add_command, console
from tokencredit.distribute.workers import add_ray, workers_of
from tokencredit.limits import check_rows
from tokencredit.lm.arguments import add_policy, add_sampler, policy_config, rows_of
from tokencredit.scores.table import SCORES

if TYPE_CHECKING:
    from tokencredit.distribute.host import Host
    from tokencredit.distribute.pool import Alone, Pool
    from tokencredit.lm.completions import Completion
    from tokencredit.lm.policy import Policy
    from tokencredit.logs import LoggedRollout

EXAMPLES = """examples:
  tokencredit score --out scores.parquet
  tokencredit score --data rollouts/ --model runs/mine --column reward=score --out s.parquet
  tokencredit score --data completions.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --chat --task gsm8k --out s.parquet
  tokencredit score --task gsm8k --prompts 50 --samples 4 --scores entropy gradient_norm --out scores.parquet
  tokencredit score --task verify.py:check --option path=data.jsonl --model runs/mine --out scores.parquet"""

SHARD = 64  # prompts whose completions are sampled together

WAYS = {
    "finite_difference": "a sketch, by finite differences along random directions",
    "jvp": "a sketch, by forward mode along random directions",
}


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    summary = "Scores of every token of given or sampled completions: log-prob, entropy, importance proxies."
    p = add_command(commands, "score", run, summary, f"{EXAMPLES}\n\nscores:\n{_score_table()}")
    p.add_argument("--out", type=Path, required=True, help="Parquet file to write: row per completion, list per score")
    p.add_argument(
        "--data",
        type=Path,
        nargs="+",
        help="files or directories of prompts and completions: any JSONL or Parquet, or what a trainer logged"
        " (docs/logs.md); without it they are sampled from --task",
    )
    p.add_argument("--format", metavar="NAME", help="of --data, where its columns do not tell it")
    p.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="what a column of --data is, like prompt=question; repeatable",
    )
    p.add_argument(
        "--scores",
        nargs="+",
        default=["logprob", "entropy"],
        metavar="SCORE",
        help="any of those below (default: logprob entropy)",
    )
    p.add_argument(
        "--directions",
        type=int,
        metavar="K",
        help="directions of the sketches of gradients (default: 8, and exact where that is cheap)",
    )
    p.add_argument(
        "--method",
        default="auto",
        choices=["auto", "exact", "sketch", "jvp", "finite_difference"],
        help="of gradient norms and Fisher traces (default: %(default)s, exact where that costs less than a sketch, or"
        " a moment, and no --directions are given)",
    )
    p.add_argument("--parameters", default="all", help="all, trainable, lora, or a name pattern (default: %(default)s)")
    p.add_argument("--split", default="test", choices=["train", "test"], help="(default: %(default)s)")
    p.add_argument("--prompts", type=int, default=32, help="how many prompts to sample from (default: %(default)s)")
    p.add_argument("--samples", type=int, default=1, help="completions per prompt (default: %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="completions scored together, at most (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of prompts, samples and directions (default: %(default)s)")
    add_policy(p)
    add_ray(p)
    add_sampler(p)


def _score_table() -> str:
    """The scores that the command measures, and what each is."""
    return "\n".join(f"  {score.name:<22} {score.what} [{score.unit}]" for score in SCORES.values())


def run(args: argparse.Namespace) -> int:
    from tokencredit.lm.load import run_of
    from tokencredit.scores.table import check_available

    config, workers = policy_config(args), workers_of(args)
    if args.directions is not None and args.directions < 2:
        raise ValueError(f"--directions must be at least 2, for a standard error; got {args.directions}")
    logged = _logged(args) if args.data else []
    if args.data and config.task is None and run_of(config.model) is None:
        config = replace(config, task="given")
    settled = config.settled()
    check_available(args.scores, settled.load_task())
    with workers.open(settled) as pool:
        policy = pool.policy
        rows = from_log(args, policy, logged) if args.data else from_task(args, pool)
        if args.data and (needy := [name for name in args.scores if SCORES[name].source in ("task", "steps")]):
            raise ValueError(f"{', '.join(needy)} need the task's own rows: sample from --task in place of --data")
        columns, ways = _scores(args, pool, rows)
    about = {name: getattr(args, name) for name in ("directions", "method", "parameters", "seed")}
    about |= {"ways": {name: sorted(found) for name, found in ways.items() if found}}
    about |= {"policy": settled.as_dict(), "command": getattr(args, "command_line", "")}
    write(args.out, rows, columns, policy.tokens, about)
    for name, taken in ways.items():
        if SCORES[name].source == "importance" and taken:
            console.print(f"{name}: {', '.join(WAYS.get(way, way) for way in taken)}", soft_wrap=True)
    num = sum(len(row["completion_ids"]) for row in rows)
    console.print(f"{num} tokens of {len(rows)} completions: {args.out}", soft_wrap=True)
    return 0


def _scores(
    args: argparse.Namespace, pool: Pool | Alone, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[list[float]]], dict[str, Counter[str]]]:
    """({score: [T] of every row}, {score: how often it was computed in which way}), `args.batch` rows at a time."""
    from tokencredit.distribute.pool import done
    from tokencredit.progress import bar

    options = {"num_directions": args.directions, "method": args.method, "parameters": args.parameters}
    pieces = [rows[start : start + args.batch] for start in range(0, len(rows), args.batch)]
    with bar(console, "scoring", len(rows)) as advance:
        found = done(pool, _scored, [(some, args.scores, args.seed, options) for some in pieces], advance, _rows)
    columns = {name: [values for piece, _ in found for values in piece[name]] for name in args.scores}
    return columns, {name: sum((ways[name] for _, ways in found), Counter()) for name in args.scores}


def _scored(
    host: Host, rows: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int, options: Mapping[str, Any]
) -> tuple[dict[str, list[list[float]]], dict[str, Counter[str]]]:
    """The same of a few rows."""
    from tokencredit.scores.measure import measure

    ways: dict[str, Counter[str]] = {name: Counter() for name in names}
    heard = {"heard": lambda kind, way: ways[kind].update([way])}
    prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    tasks = [row.get("row", {}) for row in rows]
    found = measure(host.policy, tasks, prompts, completions, names, seed=seed, importance={**options, **heard})
    if host.listen:
        host.listen(len(rows))
    return {name: [value.tolist() for value in values] for name, values in found.items()}, ways


def _logged(args: argparse.Namespace) -> list[LoggedRollout]:
    """What --data holds, read before a model is. ValueError names a bad file or row."""
    from tokencredit.logs import read
    from tokencredit.settings import read_settings

    columns = {name: str(column) for name, column in read_settings(args.column, "--column").items()}
    return list(read(args.data, format=args.format, columns=columns))


def from_log(args: argparse.Namespace, policy: Policy, logged: Sequence[LoggedRollout]) -> list[dict[str, Any]]:
    """Rows {"prompt_ids", "completion_ids"} of logged completions, with the reward, group, step and place of each, and
    as `logged_NAME` its numbers per token.
    """
    from tokencredit.console import warn
    from tokencredit.logs import encode

    encoded = encode(logged, policy.tokenizer, chat=policy.chat, limit=args.max_new_tokens)
    for note in encoded.notes:
        warn(note)
    tokens = dict.fromkeys(name for each in encoded.logged for name in each.tokens)
    rewards = dict.fromkeys(name for each in encoded.logged for name in each.rewards)
    return [
        {
            "prompt_ids": encoded.prompt_ids[i],
            "completion_ids": encoded.completion_ids[i],
            "mask": encoded.mask[i],
            "step": each.step,
            "group": encoded.group[i],
            "reward": each.reward,
            **{f"reward_{name}": each.rewards.get(name) for name in rewards},
            "advantage": each.advantage,
            "truncated": each.truncated,
            "place": each.place,
            **{f"logged_{name}": each.tokens.get(name) for name in tokens},
        }
        for i, each in enumerate(encoded.logged)
    ]


def from_task(args: argparse.Namespace, pool: Pool | Alone) -> list[dict[str, Any]]:
    """Rows sampled now, with the verifier's verdict; "row" is the task's."""
    from tokencredit.distribute.pool import done
    from tokencredit.progress import bar

    check_rows(args.prompts * args.samples, "--prompts x --samples")
    policy = pool.policy
    rows = rows_of(args, policy.task)
    prompts = policy.encode_rows(rows)
    calls = [
        (prompts[first : first + SHARD], args.samples, args.seed, first) for first in range(0, len(prompts), SHARD)
    ]
    with bar(console, "sampling", len(rows) * args.samples) as advance:
        drawn = [group for piece in done(pool, _drawn, calls, advance, _written) for group in piece]
    return [
        {
            "prompt_ids": prompts[i],
            "completion_ids": list(completion.ids),
            "group": i,
            "truncated": completion.truncated,
            "correct": policy.verdict(completion.ids, rows[i], completion.truncated).correct,
            "row": rows[i],
        }
        for i, group in enumerate(drawn)
        for completion in group
    ]


def _rows(found: tuple[dict[str, list[list[float]]], Any]) -> tuple[int, int]:
    """Rows that were scored; nothing is sampled."""
    return len(next(iter(found[0].values()))), 0


def _drawn(host: Host, prompts: Sequence[Sequence[int]], num: int, seed: int, first: int) -> list[list[Completion]]:
    return host.policy.complete(prompts, num, seed=seed, first=first, progress=host.listen)


def _written(drawn: Sequence[Sequence[Completion]]) -> tuple[int, int]:
    """Rows and tokens that were sampled."""
    return sum(map(len, drawn)), sum(len(each.ids) for group in drawn for each in group)


def write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, list[Any]],
    tokens: Callable[[Sequence[int]], list[str]],
    about: Mapping[str, Any],
) -> None:
    """The rows with the texts of their tokens and their scores, float32 lists; `about` goes into the file's metadata.
    Replaced whole, or left as it was. A column that no row has a value in is left out.
    """
    import pyarrow

    from tokencredit.durable import write_parquet

    given = {name: [row[name] for row in rows] for name in rows[0] if name != "row"}
    table = {name: values for name, values in given.items() if any(value is not None for value in values)}
    table["tokens"] = [tokens(row["completion_ids"]) for row in rows]
    floats = {name: pyarrow.array(values, pyarrow.list_(pyarrow.float32())) for name, values in columns.items()}
    arrays = pyarrow.table(table | floats).replace_schema_metadata({"tokencredit": json.dumps(about)})
    write_parquet(path, arrays)
