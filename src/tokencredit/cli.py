"""The command line: `tokencredit demo | train | evaluate | methods | score | pivotality | study | dynamics ...`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tokencredit import __version__
from tokencredit.argument_types import give_kinds
from tokencredit.console import Parser, add_command, console, errors, visible, warn
from tokencredit.credit_model import command as credit_model_command
from tokencredit.engines.verl import doctor
from tokencredit.figure import Figure
from tokencredit.here import look_here_last
from tokencredit.lifeline import end_with_parent
from tokencredit.lm.arguments import add_policy, add_sampler, policy_config, training_arguments
from tokencredit.pivotality import command as pivotality_command
from tokencredit.scores import command as score_command
from tokencredit.studies.command import add_dynamics, add_inspect, add_study
from tokencredit.truth import command as truth_command

TOLD = (ValueError, KeyError, OSError, ImportError, RuntimeError, TypeError)
"""Errors whose message is for whoever gave the command; of any other it is a part."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that the user can mend, 130 when interrupted."""
    _quiet()
    if argv is None:
        _as_command()
    parser = make_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    args.command_line = shlex.join(["tokencredit", *(argv if argv is not None else sys.argv[1:])])
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        console.print(
            "\nInterrupted. What a run or study had finished is kept: the same command goes on from there.",
            style="yellow",
        )
        return 130
    except Exception as error:
        if os.environ.get("TOKENCREDIT_TRACEBACK"):
            raise
        told = "\n".join([_message(error), *getattr(error, "__notes__", [])])
        errors.print(Text("error: ", style="bold red") + Text(visible(told)), soft_wrap=True)
        return 1


def _message(error: Exception) -> str:
    """What the error says; where it says nothing of use, what it is and how to see more."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory for this ({error or 'no more is known'}): ask for less at once"
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if " " in message and isinstance(error, TOLD):
        return message
    return (
        f"{type(error).__name__}: {message}. This looks like a fault in tokencredit; TOKENCREDIT_TRACEBACK=1 shows"
        " where it comes from"
    )


def _quiet() -> None:
    """The progress is ours; other libraries' chatter stays out of it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "transformers" in sys.modules:  # it read the variables when it was imported
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _as_command() -> None:
    """What a process of our own may do: a verifier in the current directory is found, who is ended stops what it
    started, and what another command started ends with it.
    """
    look_here_last()
    warnings.showwarning = warn
    end_with_parent()
    signal.signal(signal.SIGTERM, _ended)


def _ended(*_) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        errors.print(
            f"process {os.environ.get('RANK')} was ended by its launcher, as it does where another one of"
            f" {os.environ['WORLD_SIZE']} has ended. The same command goes on from the last checkpoint",
            soft_wrap=True,
        )
    sys.exit(143)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tokencredit",
        description="Which tokens deserve the credit? Train with per-token credit, measure it, explain it.",
        epilog="Start with: tokencredit demo. Every command explains itself: tokencredit train --help",
    )
    parser.add_argument("--version", action="version", version=f"tokencredit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="")
    own = (_demo_parser, _train_parser, _evaluate_parser, _methods_parser, _world_parser, _report_parser)
    measuring = (score_command.add_parser, pivotality_command.add_parser, credit_model_command.add_parser)
    for add in (*own, *measuring, add_study, add_dynamics, add_inspect, doctor.add_parser):
        add(commands)
    give_kinds(parser)
    return parser


def _command(commands, name: str, run, summary: str, examples: str) -> argparse.ArgumentParser:
    return add_command(commands, name, run, summary, f"examples:{examples}")


def _demo_parser(commands) -> None:
    p = _command(
        commands,
        "demo",
        _demo,
        "Train GRPO, DAPO and GTPO on the embedded world, on this CPU, and write a report.",
        """
  tokencredit demo
  tokencredit demo --seeds 5 --steps 30 --out runs/claims
  tokencredit demo --methods grpo ptw_entropy --seeds 3 --out runs/mine""",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="directory of runs and report (default: %(default)s)",
    )
    p.add_argument(
        "--methods", nargs="+", default=["grpo", "dapo", "gtpo"], help="methods to compare (default: grpo dapo gtpo)"
    )
    p.add_argument("--seeds", type=int, default=3, help="seeds per method (default: %(default)s)")
    p.add_argument("--steps", type=int, default=9, help="rollout batches per run (default: %(default)s)")
    p.add_argument("--workers", type=int, default=None, help="runs side by side (default: one per core, at most 4)")


def _train_parser(commands) -> None:
    from tokencredit.train_config import field_table

    p = _command(
        commands,
        "train",
        _train,
        "Train a model on a task with a method; an interrupted run goes on where it was.",
        f"""
  tokencredit train --method gtpo --out runs/gtpo
  tokencredit train --config run.yaml --out runs/mine --set learning_rate=1e-4 --set method_options.alpha='[1, 0.2]'
  tokencredit train --task my_verifier.py:verify --option path=train.jsonl --out runs/own
  tokencredit train --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --option chat=true --method dapo --out runs/q \\
      --max-new-tokens 1024 --set trl.use_vllm=true

fields of --config and --set:
{field_table()}""",
    )
    p.add_argument("--out", type=Path, required=True, help="run directory")
    p.add_argument("--config", type=Path, help="YAML or JSON file with any field of TrainConfig")
    p.add_argument("--method", help="a name that `tokencredit methods` lists (default: grpo)")
    p.add_argument("--steps", type=int, help="rollout batches (default: 40)")
    p.add_argument("--seed", type=int, help="seed of prompts, sampling and initialisation (default: 0)")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="any other field; repeatable"
    )
    p.add_argument("--quiet", action="store_true", help="no progress display")
    add_policy(p)


def _evaluate_parser(commands) -> None:
    p = _command(
        commands,
        "evaluate",
        _evaluate,
        "pass@1 and pass@k, sampled and greedy, with 95 % intervals by prompt.",
        """
  tokencredit evaluate
  tokencredit evaluate --model runs/demo/gtpo-0 --samples 16
  tokencredit evaluate --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --option chat=true --out eval.json""",
    )
    p.add_argument("--split", default="test", choices=["train", "test"], help="(default: %(default)s)")
    p.add_argument("--prompts", type=int, help="how many prompts (default: 512 on the embedded task, 128 on any other)")
    p.add_argument(
        "--samples", type=int, help="completions per prompt; pass@k up to this k (default: 8, and 4 on any other)"
    )
    p.add_argument("--batch", type=int, default=512, help="completions sampled at once, at most (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    add_policy(p)
    add_sampler(p)


def _methods_parser(commands) -> None:
    p = _command(
        commands,
        "methods",
        _methods,
        "The table of methods, or one method in full.",
        """
  tokencredit methods
  tokencredit methods gtpo""",
    )
    p.add_argument("name", nargs="?", help="a method: its formula, fields and source")


def _world_parser(commands) -> None:
    p = _command(
        commands,
        "world",
        None,
        "The embedded world: its base model, a look at it, and a known truth for estimators.",
        """
  tokencredit world build --seed 1 --out my_base
  tokencredit world show
  tokencredit world truth --out truth""",
    )
    actions = p.add_subparsers(title="actions", metavar="")
    b = _command(
        actions,
        "build",
        _build,
        "Teach the base model from scratch (about a minute on two cores).",
        "\n  tokencredit world build --out my_base",
    )
    b.add_argument("--out", type=Path, required=True, help="directory for the model and its tokenizer")
    b.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    b.add_argument("--operands", type=int, nargs="+", default=[3, 4], help="numbers per prompt (default: 3 4)")
    b.add_argument("--no-wording", action="store_true", help="one joint word only: entropy becomes a good proxy")
    s = _command(
        actions,
        "show",
        _show,
        "A few prompts with demonstrations, tokens labelled by role.",
        "\n  tokencredit world show --num 3",
    )
    s.add_argument("--num", type=int, default=3, help="(default: %(default)s)")
    truth_command.add_parsers(actions)


def _report_parser(commands) -> None:
    p = _command(
        commands,
        "report",
        _report,
        "One self-contained HTML page of training runs, studies and pivotality runs.",
        """
  tokencredit report runs/demo/* --out report.html
  tokencredit report runs/gtpo runs/pivots runs/correlation --out all.html""",
    )
    p.add_argument("runs", type=Path, nargs="+", help="directories of runs and studies, or directories of these")
    p.add_argument("--out", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    p.add_argument("--title", default="tokencredit report", help="(default: %(default)s)")


def _demo(args) -> int:
    from tokencredit.studies.demo import demo

    page, failed = demo(
        args.out, methods=args.methods, seeds=args.seeds, steps=args.steps, workers=args.workers, console=console
    )
    console.print(f"\nReport: {page.resolve()}", soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} runs failed and are not in it: {', '.join(failed)}", style="red", soft_wrap=True)
    return 1 if failed else 0


def _train(args) -> int:
    from tokencredit.train_config import read_config

    config = read_config(
        args.config,
        args.settings,
        method=args.method,
        steps=args.steps,
        seed=args.seed,
        **training_arguments(args),
    )
    config.build_method()
    from tokencredit.engines.processes import is_first
    from tokencredit.engines.train import train
    from tokencredit.progress import TrainProgress
    from tokencredit.studies.pages import write_page

    def page(out: Path) -> Path:
        return write_page([out], out / "report.html", title=str(out))

    with TrainProgress(console, config, quiet=args.quiet or not is_first()) as progress:
        told = {"command": args.command_line, "listen": progress.listen, "page": page}
        train(config, args.out, memory=args.memory, **told)
    if not is_first():
        return 0
    console.print(
        f"Run: {args.out}. Look at it with: {shlex.join(['tokencredit', 'report', str(args.out)])}", soft_wrap=True
    )
    return 0


def _evaluate(args) -> int:
    from tokencredit.limits import check_rows
    from tokencredit.lm.evaluate import evaluate
    from tokencredit.lm.load import EMBEDDED, called
    from tokencredit.progress import bar
    from tokencredit.runs import write_json

    settled = policy_config(args).settled()
    usual = (512, 8) if settled.task == EMBEDDED else (128, 4)
    prompts, samples = args.prompts or usual[0], args.samples or usual[1]
    check_rows(prompts * samples, "--prompts x --samples")
    rows = settled.load_task().rows(args.split, prompts, args.seed)
    policy = settled.open()
    with bar(console, "sampling", len(rows) * (samples + 1)) as advance:
        figures = evaluate(
            policy,
            rows,
            num_samples=samples,
            ks=sorted({1, samples}),
            seed=args.seed,
            batch=args.batch,
            progress=advance,
        )
    about = f"{len(rows)} prompts, temperature {policy.temperature:g}"
    task = " ".join([str(settled.task), *(f"{name}={value}" for name, value in settled.options.items())])
    console.print(f"{called(settled.model)} on {task} ({args.split}), {about}", soft_wrap=True)
    console.print(_figures(figures))
    if args.out:
        made = {"command": args.command_line, "seed": args.seed, "policy": settled.as_dict()}
        write_json(args.out, {**made, "figures": figures})
        console.print(f"Figures: {args.out}", soft_wrap=True)
    return 0


def _figures(figures: dict) -> Table:
    table = Table("figure", box=None, pad_edge=False)
    for name in ("value", "95 % interval, by prompt"):
        table.add_column(name, justify="right")
    for name, figure in figures.items():
        if isinstance(figure, dict) and "low" in figure:
            table.add_row(name, *Figure.from_json(figure).numbers(".3f"))
    return table


def _methods(args) -> int:
    from tokencredit.methods import METHODS

    if args.name:
        console.print(_explain(METHODS[args.name]), soft_wrap=True)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("name", "what it changes, its source [and its fidelity]", "needs"):
        table.add_column(Text(column), no_wrap=column == "name")
    for method in METHODS.values():
        about = Text.assemble(method.summary, "\n", (f"{method.source} [{method.fidelity}]", "dim"))
        table.add_row(Text(method.name, style="bold"), about, "\n".join(sorted(method.needs)) or "-")
    console.print(table)
    console.print("\nOne in full, with its formula, fields and source: tokencredit methods gtpo")
    return 0


def _explain(method) -> str:
    """A method in full: its parts, each with its own docstring, and its fields with their values."""
    import inspect

    from tokencredit.scores.table import SCORES, UNMEASURED

    parts = [*_spread(method.chain), method.surrogate, method.aggregate]
    lines = [
        f"{method.name}: {method.summary}",
        f"source: {method.source} (fidelity: {method.fidelity})",
        f"needs: {', '.join(sorted(method.needs)) or 'no scores'}",
    ]
    known = SCORES | UNMEASURED
    lines += [f"    {name}: {known[name].what} [{known[name].unit}]" for name in sorted(method.needs & known.keys())]
    if method.needs & UNMEASURED.keys():
        lines.append("    which nobody here measures: CreditTrainer(scorers=...) takes it")
    if method.mixed_groups_only:
        lines.append("dynamic sampling: prompts are drawn again until every group holds both outcomes")
    for part in parts:
        lines += ["", repr(part), "    " + (inspect.getdoc(part) or "").replace("\n", "\n    ")]
    lines += ["", f'change a field: METHODS["{method.name}"].replace(...) or --set method_options.FIELD=VALUE; fields:']
    lines += [f"    {name} = {value!r}" for name, value in sorted(method.hyperparameters().items())]
    return "\n".join(lines)


def _spread(chain) -> list:
    """The parts of a chain in order, those of a sum or a chain within it behind it."""
    from tokencredit.credit import Chain, Sum

    found = []
    for part in chain.parts:
        found += [] if isinstance(part, Chain) else [part]
        found += _spread(part) if isinstance(part, Chain | Sum) else []
    return found


def _build(args) -> int:
    from tokencredit.progress import bar
    from tokencredit.tasks import world

    with bar(console, "teaching", None) as advance:
        figures = world.build(
            args.out,
            seed=args.seed,
            operands=tuple(args.operands),
            wording=not args.no_wording,
            progress=lambda step, total, found: advance(step, total=total, absolute=True),
        )
    console.print(
        "\n".join(
            f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in figures.items()
        )
    )
    return 0


def _show(args) -> int:
    import random

    from tokencredit.tasks.reckon import Reckon

    task = Reckon()
    for i, row in enumerate(task.rows("train", args.num, 0)):
        tokens = task.demonstrate(row, random.Random(i)).split()
        console.print(Text(row["prompt"], style="bold"), Text(f"answer {row['answer']}", style="dim"))
        console.print(Text("  ".join(f"{token}({role})" for token, role in zip(tokens, task.roles(row, tokens)))))
    return 0


def _report(args) -> int:
    from tokencredit.studies.learning import apart, find_runs
    from tokencredit.studies.pages import write_page

    found = find_runs(args.runs)
    page = write_page(found, args.out, title=args.title)
    counts = [
        f"{len(some)} {one if len(some) == 1 else many}"
        for some, one, many in zip(
            apart(found), ("run", "study", "pivotality run"), ("runs", "studies", "pivotality runs")
        )
        if some
    ]
    told = " and ".join([*([", ".join(counts[:-1])] if counts[1:] else []), counts[-1]])
    console.print(f"Report of {told}: {page.resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
