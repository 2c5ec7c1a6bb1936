"""`tokencredit score`: prompts and completions in, one Parquet row per completion with its tokens' scores out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokencredit.console import console
from tokencredit.durable import read_rows
from tokencredit.limits import check_rows
from tokencredit.lm.arguments import add_policy, policy_config, rows_of
from tokencredit.scores.table import SCORES
from tokencredit.tasks.data import read_objects

EXAMPLES = """examples:
  tokencredit score --out scores.parquet
  tokencredit score --data completions.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --chat --task gsm8k --out s.parquet
  tokencredit score --task gsm8k --prompts 50 --samples 4 --scores entropy gradient_norm --out scores.parquet
  tokencredit score --task verify.py:check --option path=data.jsonl --model runs/mine --out scores.parquet"""


WAYS = {
    "finite_difference": "a sketch, by finite differences along random directions",
    "jvp": "a sketch, by forward mode along random directions",
}


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    summary = "Scores of every token of given or sampled completions: log-prob, entropy, importance proxies."
    p = commands.add_parser(
        "score",
        help=summary,
        description=summary,
        epilog=f"{EXAMPLES}\n\nscores:\n{_score_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    p.add_argument("--out", type=Path, required=True, help="Parquet file to write: row per completion, list per score")
    p.add_argument(
        "--data",
        type=Path,
        help="JSONL or Parquet file of prompts and completions; without it they are sampled from --task",
    )
    p.add_argument("--prompt-column", default="prompt", help="text, messages, or token ids (default: %(default)s)")
    p.add_argument(
        "--completion-column",
        default="completion",
        help="text, an assistant's message, or token ids (default: %(default)s)",
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


def _score_table() -> str:
    """The scores that the command measures, and what each is."""
    return "\n".join(f"  {score.name:<22} {score.what} [{score.unit}]" for score in SCORES.values())


def run(args: argparse.Namespace) -> int:
    from tokencredit.lm.policy import run_of
    from tokencredit.progress import bar
    from tokencredit.scores.measure import measure
    from tokencredit.scores.table import check_available

    config = policy_config(args)
    if args.directions is not None and args.directions < 2:
        raise ValueError(f"--directions must be at least 2, for a standard error; got {args.directions}")
    if args.data and not args.data.exists():
        raise ValueError(f"no such file: {args.data}")
    if args.data and config.task is None and run_of(config.model) is None:
        config = replace(config, task="given")
    settled = config.settled()
    check_available(args.scores, settled.load_task())
    policy = settled.open()
    rows = from_file(args, policy) if args.data else from_task(args, policy)
    if not rows:
        raise ValueError(f"{args.data or settled.task}: no completions to score")
    if args.data and (needy := [name for name in args.scores if SCORES[name].source in ("task", "steps")]):
        raise ValueError(f"{', '.join(needy)} need the task's own rows: sample from --task in place of --data")
    ways: dict[str, Counter[str]] = {name: Counter() for name in args.scores}
    options = {"num_directions": args.directions, "method": args.method, "parameters": args.parameters}
    options["heard"] = lambda kind, way: ways[kind].update([way])
    columns: dict[str, list[list[float]]] = {name: [] for name in args.scores}
    with bar(console, "scoring", len(rows)) as advance:
        for start in range(0, len(rows), args.batch):
            some = rows[start : start + args.batch]
            prompts, completions = ([row[name] for row in some] for name in ("prompt_ids", "completion_ids"))
            tasks = [row.get("row", {}) for row in some]
            found = measure(policy, tasks, prompts, completions, args.scores, seed=args.seed, importance=options)
            for name, values in found.items():
                columns[name] += [value.tolist() for value in values]
            advance(len(some))
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


def from_file(args: argparse.Namespace, policy: Any) -> list[dict[str, Any]]:
    """Rows {"prompt_ids", "completion_ids"} of a file: text is tokenised, messages go through the chat template. A bad
    row is named.
    """
    from tokencredit.lm.prompts import encode_completion, is_ids

    rows = []
    for i, row in enumerate(_read(args.data)):
        for column in (args.prompt_column, args.completion_column):
            if row.get(column) is None:
                raise ValueError(f"{args.data}, row {i}: no column {column!r}; it has: {', '.join(map(str, row))}")
        prompt, completion = row[args.prompt_column], row[args.completion_column]
        try:
            ids = encode_completion(policy.tokenizer, completion)
            prompt_ids = list(prompt) if is_ids(prompt) else policy.encode(prompt)
        except ValueError as error:
            raise ValueError(f"{args.data}, row {i}: {error}") from error
        rows.append({"prompt_ids": prompt_ids, "completion_ids": ids})
    return rows


def from_task(args: argparse.Namespace, policy: Any) -> list[dict[str, Any]]:
    """Rows sampled now, with the verifier's verdict; "row" is the task's."""
    from tokencredit.progress import bar

    check_rows(args.prompts * args.samples, "--prompts x --samples")
    rows = rows_of(args, policy.task)
    prompts = policy.encode_rows(rows)
    with bar(console, "sampling", len(rows) * args.samples) as advance:
        drawn = policy.complete(prompts, args.samples, seed=args.seed, progress=advance)
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


def _read(path: Path) -> Iterator[dict[str, Any]]:
    rows = enumerate(read_rows(path), start=1) if path.suffix == ".parquet" else read_objects(path)
    for _, row in rows:
        yield row


def write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, list[Any]],
    tokens: Callable[[Sequence[int]], list[str]],
    about: Mapping[str, Any],
) -> None:
    """The rows with the texts of their tokens and their scores, float32 lists; `about` goes into the file's metadata.
    Replaced whole, or left as it was.
    """
    import pyarrow

    from tokencredit.durable import write_parquet

    table = {name: [row[name] for row in rows] for name in rows[0] if name != "row"}
    table["tokens"] = [tokens(row["completion_ids"]) for row in rows]
    floats = {name: pyarrow.array(values, pyarrow.list_(pyarrow.float32())) for name, values in columns.items()}
    arrays = pyarrow.table(table | floats).replace_schema_metadata({"tokencredit": json.dumps(about)})
    write_parquet(path, arrays)
