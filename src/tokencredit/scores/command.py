"""`tokencredit score`: prompts and completions in, one Parquet row per completion with its tokens' scores out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.console import add_command, console
from tokencredit.distribute.workers import add_ray, workers_of
from tokencredit.limits import check_rows
from tokencredit.lm.arguments import add_policy, add_sampler, policy_config, rows_of
from tokencredit.scores.table import SCORES

if TYPE_CHECKING:
    import numpy as np

    from tokencredit.distribute.host import Host
    from tokencredit.distribute.pool import Alone, Pool
    from tokencredit.lm.policy import Policy
    from tokencredit.logs import LoggedRollout
    from tokencredit.stages import Stages

EXAMPLES = """examples:
  tokencredit score --out scores.parquet
  tokencredit score --data rollouts/ --model runs/mine --column reward=score --out s.parquet
  tokencredit score --data completions.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --chat --task gsm8k --out s.parquet
  tokencredit score --task gsm8k --prompts 50 --samples 4 --scores entropy gradient_norm --out scores.parquet
  tokencredit score --task verify.py:check --option path=data.jsonl --model runs/mine --out scores.parquet"""

SHARD = 64  # prompts whose completions are sampled together, at most

ROWS = "/rows"
ASKED, OF_TASK = ("scores", "directions", "method", "parameters", "batch"), ("split", "prompts", "samples")
"""Arguments that make the file this one and no other, besides the policy, its rows and the seed."""

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
    from tokencredit.scores.unfinished import pieces_beside

    config, workers, command = policy_config(args), workers_of(args), getattr(args, "command_line", "")
    if args.directions is not None and args.directions < 2:
        raise ValueError(f"--directions must be at least 2, for a standard error; got {args.directions}")
    logged = _logged(args) if args.data else []
    if args.data and config.task is None and run_of(config.model) is None:
        config = replace(config, task="given")
    settled = config.settled()
    check_available(args.scores, settled.load_task())
    with workers.open(settled) as pool:
        policy = pool.policy
        rows = from_log(args, policy, logged) if args.data else task_rows(args, policy)
        if args.data and (needy := [name for name in args.scores if SCORES[name].source in ("task", "steps")]):
            raise ValueError(f"{', '.join(needy)} need the task's own rows: sample from --task in place of --data")
        asked = {name: getattr(args, name) for name in ASKED + (() if args.data else OF_TASK)}
        asked |= {
            "policy": settled.as_dict(),
            "model_hash": pool.facts.model_hash,
            "verifier": pool.facts.source,
            "rows": _digest(rows),
        }
        of_run = {"task": settled.task, "model": settled.model, "seed": args.seed, "command": command}
        with pieces_beside(args.out, "score", config=asked, **of_run) as stages:
            rows = rows if args.data else sampled(args, pool, rows, stages)
            columns, ways = _scores(args, pool, rows, stages)
            about = {name: getattr(args, name) for name in ("directions", "method", "parameters", "seed")}
            about |= {"ways": {name: sorted(found) for name, found in ways.items() if found}}
            about |= {"policy": settled.as_dict(), "command": command}
            write(args.out, rows, columns, policy.tokens, about)
    for name, taken in ways.items():
        if SCORES[name].source == "importance" and taken:
            console.print(f"{name}: {', '.join(WAYS.get(way, way) for way in taken)}", soft_wrap=True)
    num = sum(len(row["completion_ids"]) for row in rows)
    console.print(f"{num} tokens of {len(rows)} completions: {args.out}", soft_wrap=True)
    return 0


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of prompts, and of completions or the task's rows."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(repr((row["prompt_ids"], row.get("completion_ids"), row.get("row"))).encode())
    return digest.hexdigest()


def _scores(
    args: argparse.Namespace, pool: Pool | Alone, rows: Sequence[Mapping[str, Any]], stages: Stages
) -> tuple[dict[str, list[list[float]]], dict[str, Counter[str]]]:
    """({score: [T] of every row}, {score: how often it was computed in which way}), a piece at a time. For scores of
    siblings the rows of a group are taken together, wherever they stand.
    """
    from tokencredit.progress import bar
    from tokencredit.scores.portions import cut, passes_of

    options = {"num_directions": args.directions, "method": args.method, "parameters": args.parameters}
    most = pool.facts.together // passes_of(args.scores, args.directions)
    order = list(range(len(rows)))
    if siblings := any(SCORES[name].source == "siblings" for name in args.scores):
        order.sort(key=lambda k: rows[k]["group"])
    rows = [rows[k] for k in order]
    group = [row["group"] for row in rows] if siblings else None
    pieces = cut([(row["prompt_ids"], row["completion_ids"]) for row in rows], args.batch, most, group)
    names = [f"scores_{own.start}_{own.stop}" for own in pieces]

    def made(absent: list[int]) -> Iterator[tuple[int, Any]]:
        wanted = [pieces[n] for n in absent]
        some = [slice(own.start, own.stop) for own in wanted]
        calls = [(rows[own], args.scores, args.seed, options, own.start, group and group[own]) for own in some]
        for n, found in pool.run(_scored, calls, advance, _rows):
            yield absent[n], found

    with bar(console, "scoring", len(rows)) as advance:
        advance(sum(len(own) for own, name in zip(pieces, names) if stages.has(name)))
        found = stages.pieces(names, made)
    columns: dict[str, list[list[float]]] = {name: [[] for _ in rows] for name in args.scores}
    ways: dict[str, Counter[str]] = {name: Counter() for name in args.scores}
    for own, piece in zip(pieces, found):
        for name in args.scores:
            start, values = 0, piece[name].tolist()
            for at in own:
                stop = start + len(rows[at]["completion_ids"])
                columns[name][order[at]] = values[start:stop]
                start = stop
            ways[name].update(piece[f"{name}/ways"].tolist())
    return columns, ways


def _scored(
    host: Host,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    seed: int,
    options: Mapping[str, Any],
    first: int,
    group: Sequence[int] | None,
) -> dict[str, np.ndarray]:
    """A few rows: of every score `NAME`, the values of all tokens, one row after the other, and `NAME/ways`, in which
    way each call computed it; `rows`, their number.
    """
    import numpy as np
    import torch

    from tokencredit.scores.measure import measure

    ways: dict[str, list[str]] = {name: [] for name in names}
    heard = {"heard": lambda kind, way: ways[kind].append(way)}
    prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    tasks = [row.get("row", {}) for row in rows]
    importance = {**options, **heard}
    given = (prompts, completions, names)
    found = measure(host.policy, tasks, *given, seed=seed, first=first, group=group, importance=importance)
    if host.listen:
        host.listen(len(rows))
    values = {name: torch.cat(value).double().numpy() for name, value in found.items()}
    return values | {f"{name}/ways": np.array(taken, str) for name, taken in ways.items()} | {ROWS: np.array(len(rows))}


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

    encoded = encode(logged, policy.tokenizer, chat=policy.chat, limit=args.max_new_tokens, ends=policy.ends)
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


def task_rows(args: argparse.Namespace, policy: Policy) -> list[dict[str, Any]]:
    """{"prompt_ids", "row"} of the task's rows that are asked for."""
    check_rows(args.prompts * args.samples, "--prompts x --samples")
    rows = rows_of(args, policy.task)
    return [{"prompt_ids": ids, "row": row} for ids, row in zip(policy.encode_rows(rows), rows)]


def sampled(
    args: argparse.Namespace, pool: Pool | Alone, asked: Sequence[Mapping[str, Any]], stages: Stages
) -> list[dict[str, Any]]:
    """Rows sampled from those of `task_rows`, with the verifier's verdict."""
    from tokencredit.lm.completions import of_arrays
    from tokencredit.progress import bar

    policy, num = pool.policy, args.samples
    size = min(max(pool.facts.together // max(num * policy.max_new_tokens, 1), 1), SHARD)
    pieces = [asked[start : start + size] for start in range(0, len(asked), size)]
    names = [f"sampled_{k * size}_{k * size + len(own)}" for k, own in enumerate(pieces)]

    def made(absent: list[int]) -> Iterator[tuple[int, Any]]:
        calls = [([row["prompt_ids"] for row in pieces[k]], num, args.seed, k * size) for k in absent]
        for n, found in pool.run(_drawn, calls, advance, _written):
            yield absent[n], found

    with bar(console, "sampling", len(asked) * num) as advance:
        advance(num * sum(len(own) for own, name in zip(pieces, names) if stages.has(name)))
        drawn = [each for piece in stages.pieces(names, made) for each in of_arrays(piece)]
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": list(completion.ids),
            "group": i,
            "truncated": completion.truncated,
            "correct": policy.verdict(completion.ids, row["row"], completion.truncated).correct,
            "row": row["row"],
        }
        for i, row in enumerate(asked)
        for completion in drawn[i * num : (i + 1) * num]
    ]


def _rows(found: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Rows that were scored; nothing is sampled."""
    return int(found[ROWS]), 0


def _drawn(host: Host, prompts: Sequence[Sequence[int]], num: int, seed: int, first: int) -> dict[str, np.ndarray]:
    from tokencredit.lm.completions import as_arrays

    found = host.policy.complete(prompts, num, seed=seed, first=first, progress=host.listen)
    return as_arrays([each for group in found for each in group])


def _written(drawn: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Rows and tokens that were sampled."""
    return len(drawn["length"]), len(drawn["ids"])


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
