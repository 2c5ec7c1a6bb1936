"""What was learned, by method: curves over training and the last step's figures, with intervals over seeds.

Question: how do the runs of several methods compare in pass@1, pass@k, entropy and length? Each method's seeds are its
units; with one seed the interval is the evaluation's own, over prompts. Steps count where every seed of a method has
reached them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.methods import METHODS
from tokencredit.runs import Run, RunError
from tokencredit.stats import Estimate, mean_of_units
from tokencredit.studies.claims import findings, learned
from tokencredit.studies.pivots import holds_pivots
from tokencredit.studies.table import study_in

# What an evaluation's figures depend on besides the policy; the rest of a config is how the policy was made.
SAME_FOR_ALL = ("task", "task_options", "model", "temperature", "max_new_tokens", "eval_prompts", "eval_samples")
# What makes no other run: seeds and how a run is watched.
FREE_WITHIN_METHOD = (
    "seed",
    "threads",
    "save_every",
    "record_every",
    "record_rows",
    "eval_every",
    "eval_batch",
    "accumulate",
)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Directories of runs and of studies: these, and those one level below these. What a shell's * also finds is passed
    over: files without a word, a directory that holds neither with a warning.

    ValueError names a path that does not exist, or all of them where none holds a run or study.
    """
    found: dict[Path, None] = {}
    empty: list[str] = []
    for path in map(Path, paths):
        if path.is_file():
            continue
        here = [path] if _holds(path) else sorted(below for below in path.glob("*/") if _holds(below))
        if not path.exists():
            raise ValueError(f"{path}: no such directory")
        if not here:
            empty.append(f"{path}: {_absent(path)}")
        found |= dict.fromkeys(here)
    if empty and not found:
        raise ValueError("\n".join(empty))
    for told in empty:
        warnings.warn(f"left out of the page: {told}", stacklevel=2)
    if not found:
        raise ValueError(f"no directory of a run or study in: {', '.join(map(str, paths))}")
    return list(found)


def apart(directories: Sequence[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """(training runs, studies, pivotality runs) among the directories found. ValueError names a study that has not
    finished.
    """
    studies = [path for path in directories if study_in(path)]
    pivots = [path for path in directories if path not in studies and holds_pivots(path)]
    runs = [path for path in directories if path not in studies and path not in pivots]
    for path in runs:
        if Run.open(path).kind == "study":
            raise ValueError(
                f"{path}: this study has no result yet; give its command again and it goes on where it was"
            )
    return runs, studies, pivots


def _absent(path: Path) -> str:
    if (path / "store").exists() or (path / "alternatives.parquet").exists():
        return "a run of `tokencredit pivotality` that has not finished: give its command again"
    return "no run or study here (no run.json, no result.json of `tokencredit study`)"


def _holds(path: Path) -> bool:
    return (path / "run.json").exists() or study_in(path) is not None or holds_pivots(path)


def comparable(run_dirs: Sequence[Path]) -> dict[str, list[Path]]:
    """The runs in groups that may be compared: of one task, model and evaluation. A group is called by its task, a file
    by its name, and by what else tells it from another one that is called so.
    """
    groups: dict[str, list[Run]] = {}
    for run in map(Run.open, run_dirs):
        known = {key: _setting(run, key) for key in SAME_FOR_ALL}
        groups.setdefault(json.dumps(known, sort_keys=True, default=str), []).append(run)
    firsts = [group[0] for group in groups.values()]
    return {_called(group[0], firsts): [run.path for run in group] for group in groups.values()}


def _called(run: Run, others: Sequence[Run]) -> str:
    task = Path(str(_setting(run, "task"))).name
    same = [other for other in others if Path(str(_setting(other, "task"))).name == task]
    differing = [key for key in SAME_FOR_ALL if len({repr(_setting(other, key)) for other in same}) > 1]
    return ", ".join([task, *(f"{key.replace('_', ' ')} {_setting(run, key)}" for key in differing)])


def compare(
    run_dirs: Sequence[str | Path], *, treatment: str = "gtpo", baselines: Sequence[str] = ("dapo", "grpo")
) -> dict[str, Any]:
    """What the report draws: {"methods", "curves", "findings", "interval"}. Figures are those of the evaluations on
    held-out prompts.

    RunError where the runs cannot be compared: other tasks, models or evaluations; a method's runs with other settings,
    or a seed twice.
    """
    runs = [Run.open(path) for path in run_dirs]
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.info["method_name"]].append(run)
    _refuse_what_differs(runs, by_method)
    lines = {name: {run.info["seed"]: run.evaluations() for run in group} for name, group in by_method.items()}
    measures = _measures(lines)
    curves = {m: {name: curve for name, seeds in lines.items() if (curve := _curve(seeds, m))} for m in measures}
    return {
        "methods": [_describe(name, group, curves) for name, group in by_method.items()],
        "curves": curves,
        "findings": findings(curves, treatment, baselines, _differing(by_method)),
        "interval": "95 % over seeds (Student's t); with one seed, over prompts",
    }


def compare_and_say(run_dirs: Sequence[str | Path]) -> dict[str, Any]:
    """`compare`, with what training did under each method among the findings, behind the claims."""
    found = compare(run_dirs)
    return {**found, "findings": [*found["findings"], *learned(found["curves"])]}


def _refuse_what_differs(runs: Sequence[Run], by_method: Mapping[str, Sequence[Run]]) -> None:
    for run in runs[1:]:
        for key in SAME_FOR_ALL:
            _same(runs[0], run, key, "their evaluations cannot be compared")
    for name, group in by_method.items():
        seeds: dict[int, Run] = {}
        for run in group:
            if (other := seeds.setdefault(run.info["seed"], run)) is not run:
                raise RunError(f"{other.path} and {run.path} are both seed {run.info['seed']} of {name}: leave one out")
            for key in sorted(group[0].info["config"].keys() | run.info["config"].keys()):
                if key not in FREE_WITHIN_METHOD:
                    _same(group[0], run, key, f"they are not seeds of one {name}; report them apart")


def _setting(run: Run, key: str) -> Any:
    return run.info["config"].get(key, run.info.get(key))


def _same(one: Run, other: Run, key: str, consequence: str) -> None:
    values = [_setting(run, key) for run in (one, other)]
    if values[0] != values[1]:
        raise RunError(f"{one.path} has {key} = {values[0]!r}, {other.path} has {values[1]!r}: {consequence}")


def _differing(by_method: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """{method: {field of its config: value}} of the fields in which the methods differ, other than the method
    itself.
    """
    configs = {name: group[0].info["config"] for name, group in by_method.items()}
    skipped = {"method", "method_options", *FREE_WITHIN_METHOD}
    keys = sorted({key for config in configs.values() for key in config} - skipped)
    return {
        name: {k: c.get(k) for k in keys if any(c.get(k) != other.get(k) for other in configs.values())}
        for name, c in configs.items()
    }


def _measures(lines: Mapping[str, Mapping[int, Sequence[dict]]]) -> list[str]:
    """Names of the evaluated figures with intervals, in the order in which they were written."""
    figures = [
        item for seeds in lines.values() for line in seeds.values() for record in line for item in record.items()
    ]
    return list(dict.fromkeys(name for name, figure in figures if isinstance(figure, dict) and "low" in figure))


def _curve(seeds: Mapping[int, Sequence[dict]], measure: str) -> dict[str, Any] | None:
    """Mean over seeds at the steps that every evaluated seed has reached, its interval, and one line per seed; None
    without any.
    """
    lines = {seed: {r["step"]: r[measure] for r in records if measure in r} for seed, records in sorted(seeds.items())}
    lines = {seed: line for seed, line in lines.items() if line}
    shared = sorted(set.intersection(*(set(line) for line in lines.values()))) if lines else []
    if not shared:
        return None
    estimates = [_over_seeds(measure, [line[step] for line in lines.values()]) for step in shared]
    return {
        "step": shared,
        "value": [e.value for e in estimates],
        "low": [e.low for e in estimates],
        "high": [e.high for e in estimates],
        "seeds": {
            str(seed): {"step": sorted(line), "value": [line[s]["value"] for s in sorted(line)]}
            for seed, line in lines.items()
        },
    }


def _over_seeds(measure: str, figures: Sequence[dict[str, float]]) -> Estimate:
    """Mean over seeds; its interval is kept above 0, and that of a share below 1, where few seeds would carry it
    outside.
    """
    if len(figures) == 1:
        return Estimate(figures[0]["value"], figures[0]["low"], figures[0]["high"], figures[0]["num"])
    share = measure.startswith("pass@") or measure in ("greedy", "truncated")
    return mean_of_units([f["value"] for f in figures]).within(0.0, 1.0 if share else math.inf)


def _describe(name: str, runs: Sequence[Run], curves: Mapping[str, Mapping[str, dict]]) -> dict[str, Any]:
    """A method: what it changes, its seeds, and its figures at the last step of its curves, which is named."""
    method = METHODS.get(name)
    last = {m: {k: c[name][k][-1] for k in ("value", "low", "high", "step")} for m, c in curves.items() if name in c}
    described = {"name": name, "label": name, "seeds": sorted(run.info["seed"] for run in runs), "summary": last}
    if method is None:
        return described
    return described | {
        "changes": method.summary,
        "source": method.source,
        "fidelity": method.fidelity,
        "needs": sorted(method.needs),
    }
