"""`tokencredit score`: prompts and completions in, one Parquet row per completion with its tokens' scores out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  tokencredit score --out scores.parquet
  tokencredit score --data completions.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --out scores.parquet
  tokencredit score --task gsm8k --prompts 50 --samples 4 --scores entropy gradient_norm --out scores.parquet"""
FORWARD = ("logprob", "entropy", "sum_p2", "varentropy", "margin")
PROXIES = (
    "surprisal",
    "head_norm",
    "last_block_norm",
    "gradient_norm",
    "fisher_trace",
    "perturbation_variance",
    "attention",
)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    summary = "Scores of every token of given or sampled completions: log-prob, entropy, importance proxies."
    p = commands.add_parser(
        "score",
        help=summary,
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    p.add_argument(
        "--out", type=Path, required=True, help="Parquet file to write: a row per completion, a list per score"
    )
    p.add_argument(
        "--data",
        type=Path,
        help="JSONL or Parquet file of prompts and completions; without it they are sampled from --task",
    )
    p.add_argument("--prompt-column", default="prompt", help="text, messages, or token ids (default: %(default)s)")
    p.add_argument("--completion-column", default="completion", help="text, or token ids (default: %(default)s)")
    p.add_argument(
        "--model",
        default="reckon",
        help="a path, hub name, or run directory (its last checkpoint) (default: %(default)s)",
    )
    p.add_argument(
        "--scores",
        nargs="+",
        default=["logprob", "entropy"],
        choices=[*FORWARD, *PROXIES],
        metavar="SCORE",
        help=f"any of: {', '.join([*FORWARD, *PROXIES])} (default: logprob entropy)",
    )
    p.add_argument(
        "--directions", type=int, default=8, help="random directions of the gradient sketches (default: %(default)s)"
    )
    p.add_argument(
        "--method",
        default="auto",
        choices=["auto", "exact", "sketch", "jvp", "finite_difference"],
        help="of gradient norms and Fisher traces (default: %(default)s)",
    )
    p.add_argument("--parameters", default="all", help="all, lora, or a name pattern (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    p.add_argument("--task", default="reckon", help="where prompts to sample from come from (default: %(default)s)")
    p.add_argument("--split", default="test", choices=["train", "test"], help="(default: %(default)s)")
    p.add_argument("--prompts", type=int, default=32, help="how many prompts to sample from (default: %(default)s)")
    p.add_argument("--samples", type=int, default=1, help="completions per prompt (default: %(default)s)")
    p.add_argument("--max-new-tokens", type=int, default=None, help="(default: the task's own limit)")
    p.add_argument("--batch", type=int, default=32, help="completions scored together (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of prompts, samples and directions (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
    from tokencredit.progress import bar

    path = resolve_model(args.model)
    tokenizer, model = load_tokenizer(path), load_model(path).eval()
    rows = from_file(args, tokenizer) if args.data else from_task(args, model, tokenizer)
    if not rows:
        raise ValueError(f"{args.data or args.task}: no completions to score")
    from rich.console import Console

    console, columns = Console(), {name: [] for name in args.scores}
    with bar(console, "scoring", len(rows)) as advance:
        for start in range(0, len(rows), args.batch):
            some = rows[start : start + args.batch]
            for name, values in score_rows(model, some, args).items():
                columns[name] += values
            advance(len(some))
    about = {
        name: getattr(args, name) for name in ("model", "temperature", "directions", "method", "parameters", "seed")
    }
    write(args.out, rows, columns, tokenizer, about | {"command": getattr(args, "command_line", "")})
    console.print(f"{sum(len(row['completion_ids']) for row in rows)} tokens of {len(rows)} completions: {args.out}")
    return 0


def score_rows(model: Any, rows: Sequence[dict], args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """{score: a list per row}; order of rows is kept."""
    import torch

    from tokencredit.lm.proxies import importance
    from tokencredit.lm.scoring import score

    prompts, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    names = [name for name in args.scores if name in FORWARD]
    found = (
        score(model, prompts, completions, temperature=args.temperature, names=names, batch=len(rows)) if names else {}
    )
    columns = {name: [x.tolist() for x in values] for name, values in found.items()}
    kinds = [name for name in args.scores if name in PROXIES]
    if kinds:
        width = max(len(p) + len(c) for p, c in zip(prompts, completions))
        ids, there, wanted = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            end = len(prompt) + len(completion)
            ids[i, :end], there[i, :end], wanted[i, len(prompt) : end] = torch.tensor([*prompt, *completion]), 1, 1
        result = importance(
            model,
            ids,
            there,
            wanted,
            kinds,
            args.directions,
            args.method,
            args.parameters,
            args.seed,
            temperature=args.temperature,
        )
        for kind in kinds:
            value = result[kind].value.cpu()
            columns[kind] = [
                value[i, len(p) : len(p) + len(c)].tolist() for i, (p, c) in enumerate(zip(prompts, completions))
            ]
    return columns


def from_file(args: argparse.Namespace, tokenizer: Any) -> list[dict]:
    """Rows {"prompt_ids", "completion_ids"} of a file: text is tokenised, messages go through the chat template. A bad
    row is named.
    """
    from tokencredit.lm.prompts import encode_prompt

    rows = []
    for i, row in enumerate(_read(args.data)):
        for column in (args.prompt_column, args.completion_column):
            if row.get(column) is None:
                raise ValueError(f"{args.data}, row {i}: no column {column!r}; it has: {', '.join(map(str, row))}")
        prompt, completion = row[args.prompt_column], row[args.completion_column]
        ids = completion if _is_ids(completion) else tokenizer(str(completion), add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "prompt_ids": list(prompt) if _is_ids(prompt) else encode_prompt(tokenizer, prompt),
                "completion_ids": list(ids),
            }
        )
    return rows


def from_task(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict]:
    """Rows sampled now, with the verifier's verdict."""
    from tokencredit.lm.evaluate import judge
    from tokencredit.lm.prompts import encode_prompt
    from tokencredit.lm.sampling import sample
    from tokencredit.tasks import load

    task = load(args.task)
    rows = task.rows(args.split, args.prompts, args.seed)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    limit = args.max_new_tokens or getattr(task, "max_new_tokens", 256)
    sampled = sample(
        model, tokenizer, prompts, args.samples, max_new_tokens=limit, temperature=args.temperature, seed=args.seed
    )
    return [
        {
            "prompt_ids": prompts[i],
            "completion_ids": list(completion.ids),
            "group": i,
            "truncated": completion.truncated,
            "correct": judge(tokenizer, task, rows[i], completion).correct,
        }
        for i, group in enumerate(sampled)
        for completion in group
    ]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) for x in value)


def _read(path: Path) -> Iterator[dict]:
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}")
            yield row


def write(path: Path, rows: Sequence[dict], columns: dict[str, list], tokenizer: Any, about: dict[str, Any]) -> None:
    """The rows with their tokens and scores, float32 lists; `about` goes into the file's metadata. Replaced whole, or
    left as it was.
    """
    import pyarrow
    import pyarrow.parquet

    from tokencredit.durable import replace_file

    table = {name: [row[name] for row in rows] for name in rows[0]}
    table["tokens"] = [tokenizer.convert_ids_to_tokens(row["completion_ids"]) for row in rows]
    arrays = pyarrow.table(
        table | {name: pyarrow.array(values, pyarrow.list_(pyarrow.float32())) for name, values in columns.items()}
    )
    arrays = arrays.replace_schema_metadata({"tokencredit": json.dumps(about)})
    write_table: Callable = pyarrow.parquet.write_table
    replace_file(path, lambda file: write_table(arrays, file))
