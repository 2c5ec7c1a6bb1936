"""`tokencredit pivotality run | plan | export`: from a model and a task to the pivotality of tokens, on files."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokencredit.durable import plain, read_json, write_json

FIXED, TWO_STAGE = "fixed", "two-stage"


def add_parser(commands: Any) -> None:
    """Adds the command to an argparse subparsers object."""
    p = _command(
        commands,
        "pivotality",
        None,
        "Which tokens decide the outcome: re-sample them and verify.",
        "  tokencredit pivotality plan\n  tokencredit pivotality run --out runs/pivots\n"
        "  tokencredit pivotality export runs/pivots",
    )
    p.set_defaults(run=lambda args: p.print_help())
    actions = p.add_subparsers(title="actions", metavar="")
    run_parser = _command(
        actions,
        "run",
        _run,
        "Measure every token of sampled completions; an interrupted run goes on where it was.",
        "  tokencredit pivotality run --out runs/pivots\n"
        "  tokencredit pivotality run --out runs/two --budget two-stage --rollouts 8 --confirm 64",
    )
    run_parser.add_argument(
        "--out", type=Path, required=True, help="directory of the rollouts, the tables and result.json"
    )
    plan_parser = _command(
        actions,
        "plan",
        _plan,
        "What such a run will cost and how precise it will be, before it is spent.",
        "  tokencredit pivotality plan --prompts 100 --rollouts 16",
    )
    plan_parser.add_argument(
        "--tokens-per-second", type=float, help="speed to assume (default: measured on 256 short rollouts)"
    )
    plan_parser.add_argument(
        "--success", type=float, default=0.5, help="success rate to assume; 0.5 is the worst (default: %(default)s)"
    )
    plan_parser.add_argument("--out", type=Path, help="also write the plan to this JSON file")
    for parser in (run_parser, plan_parser):
        _study_arguments(parser)
    e = _command(
        actions,
        "export",
        _export,
        "Preference pairs at pivotal tokens, both sides verified on fresh rollouts.",
        "  tokencredit pivotality export runs/pivots --format dpo --out pairs.jsonl",
    )
    e.add_argument("directory", type=Path, help="a directory that `tokencredit pivotality run` wrote")
    e.add_argument("--format", default="dpo", choices=["dpo", "jsonl"], help="(default: %(default)s)")
    e.add_argument("--out", type=Path, help="file of the pairs (default: pairs.jsonl in the directory)")
    e.add_argument("--fresh", type=int, default=64, help="fresh rollouts of either side (default: %(default)s)")
    e.add_argument(
        "--margin", type=float, default=0.1, help="smallest difference of success rates (default: %(default)s)"
    )
    e.add_argument(
        "--estimand",
        default="replace",
        choices=["replace", "before_after"],
        help=(
            "what makes a token pivotal; replace also finds tokens that no likely alternative contests (default:"
            " %(default)s)"
        ),
    )
    e.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")


def _command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _study_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="reckon", help="a path, hub name, or run directory (default: %(default)s)")
    p.add_argument("--task", default="reckon", help="as for train (default: %(default)s)")
    p.add_argument("--split", default="test", choices=["train", "test"], help="(default: %(default)s)")
    p.add_argument("--prompts", type=int, default=32, help="how many prompts (default: %(default)s)")
    p.add_argument(
        "--samples", type=int, default=2, help="completions per prompt whose tokens are measured (default: %(default)s)"
    )
    p.add_argument("--budget", default=FIXED, choices=[FIXED, TWO_STAGE], help="(default: %(default)s)")
    p.add_argument(
        "--rollouts", type=int, default=8, help="per token; with two stages, in the screening (default: %(default)s)"
    )
    p.add_argument(
        "--confirm", type=int, default=64, help="fresh rollouts per selected token, two stages (default: %(default)s)"
    )
    p.add_argument(
        "--select", type=float, default=0.1, help="share of tokens selected, two stages (default: %(default)s)"
    )
    p.add_argument(
        "--control",
        type=float,
        default=0.05,
        help="share of the other tokens treated alike, at random (default: %(default)s)",
    )
    p.add_argument(
        "--skip-below",
        type=float,
        default=0.0,
        help="skip tokens whose alternatives are less likely (default: %(default)s)",
    )
    p.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="0: all (default: %(default)s)")
    p.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    p.add_argument("--max-new-tokens", type=int, help="(default: the task's own limit)")
    p.add_argument("--batch", type=int, default=512, help="rows per forward pass (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


@dataclass
class _Setting:
    """Everything a study needs, built from the arguments."""

    task: Any
    model: Any
    tokenizer: Any
    sampler: Any
    limit: int
    rows: list[dict]
    traces: list
    store: Any

    def set_rows(self, rows: list[dict]) -> None:
        """One row per trace; rewards depend on it, so stored rollouts do as well."""
        self.rows = rows
        self.store.labels = [json.dumps(plain(row), sort_keys=True) for row in rows]

    def judge(self, k: int, ids: tuple[int, ...], truncated: bool) -> Any:
        return self.task.verify(self.tokenizer.decode(list(ids), skip_special_tokens=True), self.rows[k], truncated)


def _open(
    model_name: str,
    task_name: str,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    max_new_tokens: int | None,
    batch: int,
    store: Path | None,
) -> _Setting:
    from tokencredit.lm.distribution import Settings
    from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
    from tokencredit.lm.prefix_sampler import PrefixSampler
    from tokencredit.lm.sampling import end_tokens
    from tokencredit.pivotality.store import RolloutStore, model_hash, sampler_identity
    from tokencredit.tasks import load

    task, path = load(task_name), resolve_model(model_name)
    tokenizer, model = load_tokenizer(path), load_model(path)
    limit = max_new_tokens or getattr(task, "max_new_tokens", 256)
    sampler = PrefixSampler(
        model, ends=end_tokens(model, tokenizer), settings=Settings(temperature, top_k, top_p), batch=batch
    )
    identity = sampler_identity(sampler, model_name, model_hash(model), task_name, limit)
    return _Setting(task, model, tokenizer, sampler, limit, [], [], RolloutStore(store, identity))


def _from_arguments(args: argparse.Namespace, store: Path | None) -> _Setting:
    """The setting, with traces sampled from the same sampler that measures them."""
    from tokencredit.lm.distribution import seed_of
    from tokencredit.lm.prompts import encode_prompt
    from tokencredit.lm.sampling import Request, Trace

    s = _open(
        args.model,
        args.task,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        store=store,
    )
    rows = s.task.rows(args.split, args.prompts, args.seed)
    prompts = [Trace(tuple(encode_prompt(s.tokenizer, row["prompt"]))) for row in rows]
    requests = [
        Request(k, 0, s.limit, seed_of(args.seed, "trace", k, n)) for k in range(len(rows)) for n in range(args.samples)
    ]
    found = dict(s.sampler.continue_(prompts, requests))
    s.traces = [Trace(prompts[r.trace].prompt, found[i].ids) for i, r in enumerate(requests)]
    s.set_rows([rows[r.trace] for r in requests])
    return s


def _budget(args: argparse.Namespace) -> Any:
    from tokencredit.pivotality.budgets import Fixed, TwoStage

    if args.budget == FIXED:
        return Fixed(args.rollouts, args.skip_below, args.control)
    return TwoStage(args.rollouts, args.confirm, args.select, args.control, args.skip_below)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tokencredit.pivotality import record
    from tokencredit.pivotality.measure import measure
    from tokencredit.progress import bar

    budget, console = _budget(args), Console()
    setting = _from_arguments(args, args.out / "store")
    start = time.perf_counter()
    with bar(console, "rollouts", None) as advance:
        measured = measure(
            setting.traces,
            setting.sampler,
            setting.judge,
            budget=budget,
            max_new_tokens=setting.limit,
            store=setting.store,
            seed=args.seed,
            progress=advance,
        )
    record.write(args.out, measured, setting.rows, setting.tokenizer)
    command = getattr(args, "command_line", "tokencredit pivotality run")
    figures = record.figures(measured, [row["prompt"] for row in setting.rows], seed=args.seed, command=command)
    write_json(
        args.out / "result.json",
        {
            "command": command,
            "seed": args.seed,
            "budget": repr(budget),
            "identity": setting.store.identity,
            "task": args.task,
            "figures": figures,
        },
    )
    spent = time.perf_counter() - start
    known = {name: figure["value"] for name, figure in figures.items()}
    spending = f"{known['rollouts']:,} rollouts, {known['generated']:,} tokens generated in {spent:.1f} s"
    console.print(f"{known['tokens']} tokens measured with {spending}")
    console.print(f"pivotal tokens (false discovery rate .05): {known['pivotal']}; results in {args.out}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    import numpy as np
    from rich.console import Console

    from tokencredit.pivotality.budgets import TwoStage, plan
    from tokencredit.pivotality.measure import check_traces, make_stage, skip_rule

    budget, console = _budget(args), Console()
    setting = _from_arguments(args, None)
    check_traces(setting.traces, setting.sampler, setting.limit)
    first = budget.first if isinstance(budget, TwoStage) else budget
    skipped, _ = skip_rule(setting.traces, setting.sampler, first, args.seed)
    num = [np.full(len(trace.completion), first.num) for trace in setting.traces]
    stage = make_stage(setting.traces, setting.sampler, num, skipped, setting.limit, args.seed, "plan")
    speed = args.tokens_per_second or _speed(setting, stage)
    found = plan(stage.designs, budget, tokens_per_second=speed, success=args.success)
    for name, value in asdict(found).items():
        console.print(
            f"{name.replace('_', ' ')}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value:,}",
            highlight=False,
        )
    if args.out:
        write_json(
            args.out,
            {
                "command": getattr(args, "command_line", "tokencredit pivotality plan"),
                "seed": args.seed,
                "budget": repr(budget),
                "tokens_per_second": speed,
                "figures": asdict(found),
            },
        )
    return 0


def _speed(setting: _Setting, stage: Any) -> float:
    """Tokens per second on 256 of the rollouts, spread over the traces."""
    some = stage.requests[:: max(1, len(stage.requests) // 256)][:256]
    list(setting.sampler.continue_(setting.traces, some[:8]))
    start = time.perf_counter()
    num = sum(len(rollout.ids) for _, rollout in setting.sampler.continue_(setting.traces, some))
    return max(num, 1) / (time.perf_counter() - start)


def _export(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tokencredit.lm.sampling import Trace
    from tokencredit.pivotality import export, record
    from tokencredit.progress import bar

    tokens, alternatives, traces = (record.read(args.directory, name) for name in ("tokens", "alternatives", "traces"))
    result = read_json(args.directory / "result.json")
    identity = result["identity"]
    sampler = identity["sampler"]
    s = _open(
        identity["model"],
        result["task"],
        temperature=sampler["temperature"],
        top_k=sampler["top_k"],
        top_p=sampler["top_p"],
        max_new_tokens=sampler["max_new_tokens"],
        batch=512,
        store=args.directory / "store",
    )
    s.set_rows([json.loads(row["row"]) for row in traces])
    s.traces = [Trace(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in traces]
    found = export.candidates(tokens, alternatives, args.margin, args.estimand)
    console = Console()
    with bar(console, "verifying", 2 * args.fresh * len(found)) as advance:
        pairs = export.verify_pairs(
            found,
            s.traces,
            s.sampler,
            s.judge,
            s.store,
            num=args.fresh,
            max_new_tokens=s.limit,
            margin=args.margin,
            seed=args.seed,
            progress=advance,
        )
    out = args.out or args.directory / "pairs.jsonl"
    export.write_pairs(out, pairs, s.tokenizer, args.format)
    console.print(
        f"{len(found)} candidates, {len(pairs)} pairs hold on {args.fresh} fresh rollouts of either side: {out}"
    )
    return 0
