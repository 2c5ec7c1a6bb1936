"""`tokencredit pivotality run | plan | export`: from a model and a task to the pivotality of tokens, on files."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.console import add_command, console, errors, warn
from tokencredit.distribute.workers import Workers, add_ray, workers_of
from tokencredit.durable import clear_unfinished, plain, read_mapping, write_json
from tokencredit.exclusive import exclusive
from tokencredit.limits import check_rows
from tokencredit.lm.arguments import add_policy, add_sampler, policy_config, rows_of

if TYPE_CHECKING:
    from tokencredit.distribute.pool import Alone, Pool
    from tokencredit.lm.policy import Policy, PolicyConfig
    from tokencredit.lm.sampling import Trace
    from tokencredit.pivotality.crew import Crew
    from tokencredit.pivotality.store import RolloutStore
    from tokencredit.tasks.task import Row

FIXED, TWO_STAGE = "fixed", "two-stage"
BY_REPLACE = (
    "by the estimand replace, two stages found fewer of the pivotal tokens of exact worlds than a fixed budget at equal"
    " tokens (docs/pivotality.md, Budgets)"
)


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
    actions = p.add_subparsers(title="actions", metavar="")
    run_parser = _command(
        actions,
        "run",
        _run,
        "Measure every token of sampled completions; an interrupted run goes on where it was.",
        "  tokencredit pivotality run --out runs/pivots\n"
        "  tokencredit pivotality run --out runs/two --budget two-stage --estimand before_after --rollouts 4",
    )
    run_parser.add_argument(
        "--out", type=Path, required=True, help="directory of the rollouts, the tables and result.json"
    )
    run_parser.add_argument(
        "--sizes",
        type=Path,
        metavar="FILE",
        help="predicted sizes of the tokens of --traces, as `credit-model predict` writes them: a fixed budget is spent"
        " where they are large",
    )
    add_ray(run_parser)
    add_sampler(run_parser)
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
        parser.add_argument(
            "--traces",
            type=Path,
            help="completions that are there already, in place of sampled ones: a directory with traces.parquet, as"
            " `tokencredit world truth` and `pivotality run` write it",
        )
        _study_arguments(parser)
    e = _command(
        actions,
        "export",
        _export,
        "Preference pairs at pivotal tokens, both sides verified on fresh rollouts.",
        "  tokencredit pivotality export runs/pivots --out pairs.jsonl",
    )
    e.add_argument("directory", type=Path, help="a directory that `tokencredit pivotality run` wrote")
    e.add_argument(
        "--format",
        default="dpo",
        choices=["dpo", "jsonl"],
        help="dpo: token ids for PreferenceTrainer, and text to read; jsonl: everything (default: %(default)s)",
    )
    e.add_argument("--out", type=Path, help="file of the pairs (default: pairs.jsonl in the directory)")
    e.add_argument("--fresh", type=int, default=64, help="fresh rollouts of either side (default: %(default)s)")
    e.add_argument(
        "--margin", type=float, default=0.1, help="smallest difference of success rates (default: %(default)s)"
    )
    e.add_argument(
        "--estimand",
        default="before_after",
        choices=["replace", "before_after"],
        help=(
            "what makes a token pivotal; replace also finds tokens that no likely alternative contests (default:"
            " %(default)s)"
        ),
    )
    e.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")


def _command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    return add_command(commands, name, run, summary, f"examples:\n{examples}")


def _study_arguments(p: argparse.ArgumentParser) -> None:
    add_policy(p)
    p.add_argument(
        "--split",
        default="train",
        choices=["train", "test"],
        help="whose prompts; pairs of test prompts are not to be trained on (default: %(default)s)",
    )
    p.add_argument("--prompts", type=int, default=32, help="how many prompts (default: %(default)s)")
    p.add_argument(
        "--samples", type=int, default=2, help="completions per prompt whose tokens are measured (default: %(default)s)"
    )
    p.add_argument("--budget", default=FIXED, choices=[FIXED, TWO_STAGE], help=f"{BY_REPLACE} (default: %(default)s)")
    p.add_argument(
        "--rollouts", type=int, default=8, help="per token; with two stages, in the screening (default: %(default)s)"
    )
    p.add_argument(
        "--confirm", type=int, default=64, help="fresh rollouts per selected token, two stages (default: %(default)s)"
    )
    p.add_argument(
        "--select", type=float, default=0.3, help="share of tokens selected, two stages (default: %(default)s)"
    )
    p.add_argument(
        "--estimand",
        default="replace",
        choices=["replace", "before_after"],
        help=(
            "what two stages select and measure by, and whose standard errors `plan` gives; every estimand is written"
            " either way (default: %(default)s)"
        ),
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
    p.add_argument("--top-k", type=int, default=0, help="0: all (default: %(default)s)")
    p.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    p.add_argument("--batch", type=int, default=512, help="rows per forward pass, at most (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


@dataclass
class _Setting:
    """A policy, who samples it, where its rollouts are kept, and the traces that are measured, each with the task's
    row. Workers have the weights, and this process the rest.
    """

    policy: Policy
    pool: Pool | Alone
    store: RolloutStore
    rows: list[Row] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)

    def set_rows(self, rows: list[Row]) -> None:
        """One row per trace; rewards depend on it, so stored rollouts do as well."""
        self.rows = rows
        self.store.labels = [json.dumps(plain(row), sort_keys=True) for row in rows]

    @property
    def crew(self) -> Crew:
        """Who samples and verifies."""
        from tokencredit.pivotality.away import crew_of

        return crew_of(self.pool, self.policy, self.rows)


def _open(settled: PolicyConfig, pool: Pool | Alone, store: Path | None) -> _Setting:
    from tokencredit.pivotality.store import RolloutStore, sampler_identity

    policy = pool.policy
    if store is None:
        return _Setting(policy, pool, RolloutStore(None, {}))
    facts = pool.facts
    verifier = " ".join([policy.task.name if settled.task is None else settled.task, *_told(settled.options)])
    identity = sampler_identity(
        facts.sampler,
        policy.settings,
        facts.ends,
        model=settled.model,
        model_digest=facts.model_hash,
        verifier=verifier,
        verifier_source=facts.source,
        max_new_tokens=policy.max_new_tokens,
    )
    return _Setting(policy, pool, RolloutStore(store, identity))


def _told(options: Mapping[str, Any]) -> list[str]:
    """The task's options as they would be typed, in order of their names."""
    return [f"{name}={json.dumps(value)}" for name, value in sorted(options.items())]


def _from_arguments(
    args: argparse.Namespace, settled: PolicyConfig, pool: Pool | Alone, store: Path | None
) -> _Setting:
    """The setting, with traces that are given, or sampled from the same sampler that measures them."""
    from tokencredit.lm.distribution import seed_of
    from tokencredit.lm.sampling import Request, Trace
    from tokencredit.pivotality import record
    from tokencredit.progress import bar

    if args.traces:
        given = record.read(args.traces, "traces")
        check_rows(len(given) * args.rollouts, "completions of --traces x --rollouts")
    else:
        check_rows(args.prompts * args.samples * args.rollouts, "--prompts x --samples x --rollouts")
    s = _open(settled, pool, store)
    if args.traces:
        s.traces = [Trace(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in given]
        s.set_rows([json.loads(row["row"]) for row in given])
        return s
    rows, limit = rows_of(args, s.policy.task), s.policy.max_new_tokens
    prompts = [Trace(tuple(ids)) for ids in s.policy.encode_rows(rows)]
    requests = [
        Request(k, 0, limit, seed_of(args.seed, "trace", k, n)) for k in range(len(rows)) for n in range(args.samples)
    ]
    s.rows = rows
    with bar(console, "completions", len(requests)) as advance:
        found = s.store.write(prompts, requests, s.crew, advance)
    s.traces = [Trace(prompts[r.trace].prompt, ids) for r, ids in zip(requests, found)]
    s.set_rows([rows[r.trace] for r in requests])
    return s


def _budget(args: argparse.Namespace) -> Any:
    from tokencredit.pivotality.budgets import Fixed, TwoStage

    if args.budget == FIXED:
        return Fixed(args.rollouts, args.skip_below, args.control)
    if args.estimand == "replace":
        warn(f"--budget {TWO_STAGE}: {BY_REPLACE}: --estimand before_after, or --budget {FIXED}")
    return TwoStage(args.rollouts, args.confirm, args.select, args.control, args.skip_below, args.estimand)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"top_k": args.top_k, "top_p": args.top_p, "batch": args.batch}


def _run(args: argparse.Namespace) -> int:
    workers = workers_of(args)
    with exclusive(args.out):
        clear_unfinished(args.out / "store")
        settled = policy_config(args).settled()
        with workers.open(settled, **_sampling(args)) as pool:
            return _measure(args, settled, pool)


def _measure(args: argparse.Namespace, settled: PolicyConfig, pool: Pool | Alone) -> int:
    from tokencredit.lm.prompts import prompt_text
    from tokencredit.pivotality import record
    from tokencredit.pivotality.given_sizes import read_sizes
    from tokencredit.pivotality.measure import measure_with
    from tokencredit.progress import bar

    budget = _budget(args)
    if args.sizes and not args.traces:
        raise ValueError("--sizes are of given completions: name them with --traces")
    setting = _from_arguments(args, settled, pool, args.out / "store")
    sizes = read_sizes(args.sizes, setting.traces) if args.sizes else None
    start = time.perf_counter()
    with bar(console, "rollouts", None) as advance:
        found, failed = measure_with(
            setting.crew,
            setting.traces,
            budget=budget,
            max_new_tokens=setting.policy.max_new_tokens,
            store=setting.store,
            seed=args.seed,
            progress=advance,
            sizes=sizes,
        )
    measured, rows = list(found.values()), [setting.rows[k] for k in found]
    record.write(args.out, measured, rows, setting.policy)
    command = getattr(args, "command_line", "tokencredit pivotality run")
    figures = record.figures(measured, [prompt_text(row["prompt"]) for row in rows], seed=args.seed, command=command)
    write_json(
        args.out / "result.json",
        {
            "command": command,
            "seed": args.seed,
            "budget": repr(budget),
            "split": args.split,
            "identity": setting.store.identity,
            "policy": settled.as_dict(),
            "failed": {str(k): str(error) for k, error in sorted(failed.items())},
            "figures": figures,
        },
    )
    spent = time.perf_counter() - start
    known = {name: figure["value"] for name, figure in figures.items()}
    spending = f"{setting.store.generated:,} of them generated in {spent:.1f} s"
    console.print(
        f"{known['tokens']} tokens measured with {known['rollouts']:,} rollouts of {known['generated']:,} tokens,"
        f" {spending}",
        soft_wrap=True,
    )
    console.print(f"pivotal tokens (false discovery rate .05): {known['pivotal']}; results in {args.out}")
    for k, error in sorted(failed.items()):
        errors.print(f"trace {k} is not in it: {error}", soft_wrap=True)
    if failed:
        told = f"{len(failed)} of {len(setting.traces)} traces failed; the same command tries them again"
        errors.print(told, style="red", soft_wrap=True)
    return 1 if failed else 0


def _plan(args: argparse.Namespace) -> int:
    settled = policy_config(args).settled()
    with Workers().open(settled, **_sampling(args)) as pool:
        return _forecast(args, settled, pool)


def _forecast(args: argparse.Namespace, settled: PolicyConfig, pool: Pool | Alone) -> int:
    import numpy as np

    from tokencredit.pivotality.budgets import TwoStage, plan
    from tokencredit.pivotality.measure import check_traces
    from tokencredit.pivotality.stage import Wanted, make_stage, skip_rule

    budget = _budget(args)
    setting = _from_arguments(args, settled, pool, None)
    crew, limit, failed = setting.crew, setting.policy.max_new_tokens, {}
    check_traces(setting.traces, crew, limit)
    first = budget.first if isinstance(budget, TwoStage) else budget
    traces = dict(enumerate(setting.traces))
    skipped, _ = skip_rule(crew, traces, first, args.seed, failed)
    num = {k: np.full(len(trace.completion), first.num) for k, trace in traces.items()}
    wanted = {k: Wanted(num[k], skipped[k], limit, args.seed, "plan") for k in skipped}
    stage = make_stage(crew, traces, wanted, failed)
    if failed:
        raise failed[min(failed)]
    speed = args.tokens_per_second or _speed(setting, stage)
    found = plan(stage.designs, budget, tokens_per_second=speed, success=args.success, estimand=args.estimand)
    for name, value in asdict(found).items():
        console.print(
            f"{name.replace('_', ' ')}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value:,}",
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
    sampler = setting.pool.host.sampler
    list(sampler.continue_(setting.traces, some[:8]))
    start = time.perf_counter()
    num = sum(len(rollout.ids) for _, rollout in sampler.continue_(setting.traces, some))
    return max(num, 1) / (time.perf_counter() - start)


def _export(args: argparse.Namespace) -> int:
    if not args.directory.is_dir():
        raise ValueError(f"{args.directory}: no such directory")
    from tokencredit.lm.policy import PolicyConfig

    with exclusive(args.directory):
        result = read_mapping(args.directory / "result.json", "identity", "policy")
        settled, sampler = PolicyConfig(**result["policy"]), result["identity"]["sampler"]
        with Workers().open(settled, top_k=sampler["top_k"], top_p=sampler["top_p"]) as pool:
            return _export_pairs(args, settled, pool)


def _export_pairs(args: argparse.Namespace, settled: PolicyConfig, pool: Pool | Alone) -> int:
    from tokencredit.lm.sampling import Trace
    from tokencredit.pivotality import export, record
    from tokencredit.progress import bar

    split = read_mapping(args.directory / "result.json").get("split")
    if split != "train":
        told = "are of --split test" if split else "may be of --split test (the run is of an earlier version)"
        warn(f"the prompts of {args.directory} {told}: what is trained on these pairs has no held-out prompts there")
    tokens, alternatives, traces = (record.read(args.directory, name) for name in ("tokens", "alternatives", "traces"))
    s = _open(settled, pool, args.directory / "store")
    s.set_rows([json.loads(row["row"]) for row in traces])
    s.traces = [Trace(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in traces]
    found = export.candidates(tokens, alternatives, args.margin, args.estimand)
    with bar(console, "verifying", 2 * args.fresh * len(found)) as advance:
        pairs = export.verify_pairs(
            found,
            s.traces,
            s.crew,
            s.store,
            num=args.fresh,
            max_new_tokens=s.policy.max_new_tokens,
            margin=args.margin,
            seed=args.seed,
            progress=advance,
        )
    out = args.out or args.directory / "pairs.jsonl"
    export.write_pairs(out, pairs, s.policy.tokenizer, args.format)
    console.print(
        f"candidates: {len(found)}; pairs that hold on {args.fresh} fresh rollouts of either side: {len(pairs)};"
        f" written to {out}",
        soft_wrap=True,
    )
    return 0
