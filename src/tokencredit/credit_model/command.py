"""`tokencredit credit-model fit | evaluate | predict`: a learned guess of how much every token matters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokencredit.console import add_command, console, warn

EXAMPLES = """examples:
  tokencredit pivotality run --split train --prompts 200 --samples 2 --out runs/labels
  tokencredit credit-model fit runs/labels --out runs/credit_model
  tokencredit pivotality run --split test --prompts 48 --out runs/held_out
  tokencredit credit-model evaluate runs/credit_model runs/held_out
  tokencredit credit-model predict runs/credit_model --traces truth --out learned.parquet"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    summary = "Learn which tokens matter from measured effects, and ask of others."
    p = add_command(commands, "credit-model", None, summary, EXAMPLES)
    actions = p.add_subparsers(title="actions", metavar="")
    f = add_command(actions, "fit", _fit, "Fit a credit model to the effects that a pivotality run measured.", EXAMPLES)
    f.add_argument("labels", type=Path, help="a directory that `tokencredit pivotality run` wrote")
    f.add_argument("--out", type=Path, required=True, help="directory of weights.safetensors and card.json")
    f.add_argument(
        "--seed", type=int, default=0, help="of the split of prompts and the networks (default: %(default)s)"
    )
    e = add_command(
        actions, "evaluate", _evaluate, "Hold it against every cheap proxy, on prompts it has not seen.", EXAMPLES
    )
    e.add_argument("credit_model", type=Path, help="a directory that `tokencredit credit-model fit` wrote")
    e.add_argument("labels", type=Path, help="a pivotality run of other prompts, of this policy or a later one")
    e.add_argument("--seed", type=int, default=0, help="of the bootstrap over prompts (default: %(default)s)")
    e.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    d = add_command(actions, "predict", _predict, "Its size and credit of every token of given completions.", EXAMPLES)
    d.add_argument("credit_model", type=Path, help="a directory that `tokencredit credit-model fit` wrote")
    d.add_argument(
        "--traces", type=Path, required=True, help="a directory with traces.parquet: a truth, or a pivotality run"
    )
    d.add_argument("--model", help="another policy, such as a later checkpoint (default: the one it was fitted to)")
    d.add_argument(
        "--out", type=Path, required=True, help="Parquet file: trace, position, learned_size, learned_credit"
    )


def _fit(args: argparse.Namespace) -> int:
    from tokencredit.credit_model.labels import read_labels
    from tokencredit.credit_model.model import CreditModel
    from tokencredit.durable import read_mapping
    from tokencredit.lm.fingerprint import model_hash

    policy, found, labels = read_labels(args.labels)
    about = {
        "policy": read_mapping(args.labels / "result.json", "policy")["policy"],
        "model": model_hash(policy.model),
        "command": getattr(args, "command_line", "tokencredit credit-model fit"),
    }
    model = CreditModel.fit(found, labels, seed=args.seed, about=about)
    model.save(args.out)
    prompts, tokens = model.card["prompts"], model.card["tokens"]
    parts = ", ".join(f"{tokens[name]} tokens of {prompts[name]} prompts to {name}" for name in prompts)
    console.print(f"{parts}; {labels.spent:,} sampled tokens made the labels: {args.out}", soft_wrap=True)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from tokencredit.credit_model.evaluate import evaluate
    from tokencredit.credit_model.labels import read_labels
    from tokencredit.credit_model.model import CreditModel
    from tokencredit.durable import write_json
    from tokencredit.lm.fingerprint import model_hash
    from tokencredit.progress import plain_table

    model = CreditModel.load(args.credit_model)
    policy, found, labels = read_labels(args.labels)
    result = evaluate(model, found, labels, seed=args.seed)
    if result.seen:
        warn(f"{result.seen} of the {result.prompts} prompts made the model: on these it repeats what it was told")
    if model.card.get("model") not in (None, model_hash(policy.model)):
        console.print("another policy than the credit model was fitted to: this measures how far it has drifted")
    title = f"{result.tokens} tokens of {result.prompts} prompts; 95 % intervals by prompt"
    table = plain_table(title, "score", "captured by its fifth", "learned_size less it", ">p (Holm)")
    for name, figure in result.captured.items():
        difference = result.difference.get(name)
        p = "" if difference is None else f"{difference.more['holm']:.3f}"
        table.add_row(name, figure.text(), "" if difference is None else difference.text(sign=True), p)
    console.print(table)
    console.print(f"calibration {result.calibration.text()}   alignment of learned_credit {result.alignment.text()}")
    if args.out:
        figures = {name: figure.as_json() for name, figure in result.figures().items()}
        about = {"command": getattr(args, "command_line", "tokencredit credit-model evaluate"), "seed": args.seed}
        write_json(args.out, about | {"prompts_seen": result.seen, "figures": figures})
    return 0


def _predict(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from tokencredit.credit_model.model import CreditModel
    from tokencredit.durable import read_mapping, write_parquet
    from tokencredit.lm.policy import PolicyConfig
    from tokencredit.pivotality import record

    model = CreditModel.load(args.credit_model)
    config = PolicyConfig(**read_mapping(args.credit_model / "card.json", "policy")["policy"])
    policy = (replace(config, model=args.model) if args.model else config).open()
    traces = record.read(args.traces, "traces")
    prompts, completions = ([row[name] for row in traces] for name in ("prompt_ids", "completion_ids"))
    found = model.predict(
        policy.model, prompts, completions, [row["reward"] for row in traces], temperature=policy.temperature
    )
    rows = [
        {"trace": row["trace"], "position": i, **{name: float(values[k][i]) for name, values in found.items()}}
        for k, row in enumerate(traces)
        for i in range(len(row["completion_ids"]))
    ]
    write_parquet(args.out, rows)
    console.print(f"{len(rows)} tokens of {len(traces)} completions: {args.out}", soft_wrap=True)
    return 0
