"""The run directory: what a run was, its records and its results.

    run.json                    what was run: kind, method or study, task, model, config, seed, versions, status
    metrics.jsonl               one object per optimizer step
    evaluations.jsonl           one object per evaluation (step, split)
    tokens/step_000010.parquet  one row per completion, with every per-token score as a list
    checkpoints/                owned by the engine
    result.json                 the figures of a study

A process may be killed at any moment and the directory stays readable and resumable: `durable` holds how.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tokencredit.durable import (
    DamagedFile,
    append_line,
    clear_unfinished,
    plain,
    read_json,
    read_lines,
    read_mapping,
    read_rows,
    replace_file,
    write_json,
    write_parquet,
)

__all__ = ["Run", "RunError", "plain", "read_json", "token_table", "write_json"]

FORMAT = 1
FORMER_STUDIES = {"entropy dynamics": "entropy", "noise-scale": "noise_scale"}
"""What studies were called before, in files that are still there."""
IDENTITY = {
    "training": ("name", "method", "method_name", "task", "model", "config", "seed"),
    "study": ("study", "task", "model", "config", "seed"),
}
"""Fields that make a run or a study this one and no other."""
POSED = ("attribution", "compare", "correlation", "entropy dynamics", "kernel", "variance")
"""Studies whose directory once named them where a training run has its method."""
STATUSES = ("running", "finished", "failed")
REQUIRED_COLUMNS = ("group", "prompt", "completion", "reward", "success", "token_ids", "tokens")
PACKAGES = (
    "tokencredit",
    "torch",
    "transformers",
    "trl",
    "verl",
    "vllm",
    "accelerate",
    "peft",
    "datasets",
    "numpy",
    "pyarrow",
)


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message says why and what to do."""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _differences(there: Any, here: Any, name: str) -> Iterable[str]:
    """Lines `name: what is there -> what was asked`, down to the field of a mapping that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from _differences(there.get(key, "(absent)"), here.get(key, "(absent)"), f"{name}.{key}")
    elif there != here:
        yield f"  {name}: {there!r} in the directory, {here!r} asked for"


def token_table(step: int, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The Arrow table of one step's completions.

    Columns: step int, group int, prompt, completion, reward double, success bool, reason, token_ids list<int32>, tokens
    list<str>, role list<str> (or null), and one list<float32> per score (logprob, entropy, credit, any other). A number
    per completion may be added too.
    """
    import pyarrow as arrow

    text, words = arrow.string(), arrow.list_(arrow.string())
    types = {
        "step": arrow.int64(),
        "group": arrow.int64(),
        "prompt": text,
        "completion": text,
        "reward": arrow.float64(),
        "success": arrow.bool_(),
        "reason": text,
        "token_ids": arrow.list_(arrow.int32()),
        "tokens": words,
        "role": words,
    }
    rows = [{**plain(row, finite=False), "step": step} for row in rows]
    for number, row in enumerate(rows):
        if missing := [column for column in REQUIRED_COLUMNS if row.get(column) is None and column != "success"]:
            raise RunError(
                f"Completion {number} of step {step} lacks {', '.join(missing)}; it has {', '.join(sorted(row))}."
            )
        for name, value in row.items():
            if isinstance(value, list) and len(value) != len(row["tokens"]):
                raise RunError(
                    f"Completion {number} of step {step}: {name} has {len(value)} values for {len(row['tokens'])}"
                    " tokens."
                )
    columns = dict.fromkeys([*types, *(name for row in rows for name in row)])
    arrays = {}
    for name in columns:
        values = [_encodable(row.get(name)) for row in rows]
        score = name not in types and any(isinstance(value, list) for value in values)
        arrays[name] = arrow.array(values, type=arrow.list_(arrow.float32()) if score else types.get(name))
    return arrow.table(arrays)


def _encodable(value: Any) -> Any:
    """Text without lone surrogates, which a tokenizer may produce and UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [_encodable(item) for item in value] if isinstance(value, list) else value


class Run:
    """One run directory, open for reading and for recording. One process writes it at a time.

    >>> run = Run.create("runs/grpo-0", name="grpo-0", method="Method(...)", method_name="grpo", task="reckon",
    ...                  model="reckon", config={"steps": 200}, seed=0, command="tokencredit train ...")
    >>> run.log_metrics({"step": 1, "seconds": 2.5, "reward": 0.25})
    >>> run.finish("finished")
    """

    def __init__(self, path: str | os.PathLike[str], info: dict[str, Any]) -> None:
        self.path = Path(path)
        self.info = info
        self._seen: dict[str, set[tuple[Any, ...]]] = {}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        method: str,
        method_name: str,
        task: str,
        model: str,
        config: Mapping[str, Any],
        seed: int,
        command: str,
        verifier: str | None = None,
        rests_on: Mapping[str, str | None] | None = None,
    ) -> Run:
        """A new training run, or the same one opened for resuming; a directory that holds a different run is
        refused, one whose `verifier` (`tasks.source.own_source`) was edited since among them, or one that `rests_on`
        what was changed (`Run.rest_on`).
        """
        own = {"name": name, "method": method, "method_name": method_name}
        asked = {"kind": "training", **own, "task": task, "model": model, "config": config, "seed": seed}
        return cls._make(Path(path), asked, command, verifier, rests_on or {})

    @classmethod
    def create_study(
        cls,
        path: str | os.PathLike[str],
        *,
        study: str,
        task: str,
        model: str,
        config: Mapping[str, Any],
        seed: int,
        command: str,
        verifier: str | None = None,
        rests_on: Mapping[str, str | None] | None = None,
    ) -> Run:
        """A new study, or the same one opened to go on; a directory that holds another run or study is refused, or one
        of the same verifier before it was edited, or one that `rests_on` what was changed (`Run.rest_on`).
        """
        asked = {"kind": "study", "study": study, "task": task, "model": model, "config": config, "seed": seed}
        return cls._make(Path(path), asked, command, verifier, rests_on or {})

    @classmethod
    def _make(
        cls,
        path: Path,
        own: Mapping[str, Any],
        command: str,
        verifier: str | None,
        rests_on: Mapping[str, str | None],
    ) -> Run:
        asked: dict[str, Any] = plain(dict(own))
        if (path / "run.json").exists():
            return cls._resume(path, asked, command, verifier, rests_on)
        if (path / "metrics.jsonl").exists() or (path / "evaluations.jsonl").exists():
            raise RunError(
                f"{path} holds records but no run.json, so nobody can say what they are. Use another directory."
            )
        system = {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}
        info = {
            "format": FORMAT,
            **asked,
            **({"verifier_source": verifier} if verifier else {}),
            "command": command,
            "versions": _versions(),
            "platform": system,
            "started": _now(),
            "status": "running",
        }
        write_json(path / "run.json", info)
        return cls(path, info).rest_on(rests_on)

    @classmethod
    def _resume(
        cls,
        path: Path,
        asked: dict[str, Any],
        command: str,
        verifier: str | None,
        rests_on: Mapping[str, str | None],
    ) -> Run:
        run = cls.open(path)
        differences = [line for field in asked for line in _differences(run.info.get(field), asked[field], field)]
        if None not in (verifier, before := run.info.get("verifier_source")) and verifier != before:
            differences.append(
                f"  verifier_source: that of {asked['task']} was edited, so rewards there are of other code"
            )
        if differences:
            raise RunError(
                "\n".join(
                    [
                        f"{path} already holds a different run:",
                        *differences,
                        "Choose another directory, remove this one, or ask for the run that is there to resume it.",
                    ]
                )
            )
        run.rest_on(rests_on)
        clear_unfinished(path)
        if run.info["status"] != "finished":
            resumed = [*run.info.get("resumed", []), {"at": _now(), "command": command}]
            run._update(status="running", resumed=resumed)
        return run

    def rest_on(self, digests: Mapping[str, str | None]) -> Run:
        """Records what the run is made from by its name, "the weights of m", as a hash; None where there is none to
        take.

        RunError names what has another hash now than when the run first told of it.
        """
        known = dict(self.info.get("rests_on", {}))
        found = {name: digest for name, digest in digests.items() if digest is not None}
        if changed := [name for name, digest in found.items() if known.get(name, digest) != digest]:
            told = "\n".join(f"  {name} changed since: what is stored there is of the former" for name in changed)
            raise RunError(
                f"{self.path} already holds a different run:\n{told}\nChoose another directory, remove this one, or"
                " bring back what there was to go on."
            )
        if found.keys() - known.keys():
            self._update(rests_on=known | found)
        return self

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """An existing run, to read (or to go on recording, where the caller knows that it is the right one)."""
        if not (Path(path) / "run.json").exists():
            raise RunError(f"{path} holds no run: it has no run.json.")
        info = read_mapping(Path(path) / "run.json")
        if info.get("format") != FORMAT:
            raise RunError(
                f"{path} has format {info.get('format')!r}; this version of tokencredit reads format {FORMAT}."
            )
        if info.get("method_name") in POSED and "kind" not in info:
            info |= {"kind": "study", "study": FORMER_STUDIES.get(info["method_name"], info["method_name"])}
        info = {"kind": "training", **info}
        if absent := [name for name in (*IDENTITY[info["kind"]], "status") if name not in info]:
            raise DamagedFile(
                f"{Path(path) / 'run.json'} has no {', '.join(absent)}; it has {', '.join(info)}: restore it, or use"
                " another directory."
            )
        return cls(path, info)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.info['status']})"

    @property
    def kind(self) -> str:
        """training or study."""
        return str(self.info["kind"])

    @property
    def status(self) -> str:
        """running, finished or failed; a killed run stays "running" until it is resumed and finished."""
        return str(self.info["status"])

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of one optimizer step; it must hold `step`, and a step is recorded once."""
        self._append("metrics.jsonl", record, ("step",))

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append one evaluation; it must hold `step`, and a step is recorded once per `split`."""
        self._append("evaluations.jsonl", record, ("step", "split"))

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the optimizer steps, in the order they were written."""
        return self._records("metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of the evaluations, in the order they were written."""
        return self._records("evaluations.jsonl")

    def write_tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the completions of one step with their per-token scores; see `token_table` for the columns."""
        path = self.path / "tokens" / f"step_{step:06d}.parquet"
        write_parquet(path, token_table(step, rows))
        return path

    def token_steps(self) -> list[int]:
        """The steps whose completions were written, ascending."""
        named = (re.fullmatch(r"step_(\d+)", path.stem) for path in self.path.glob("tokens/step_*.parquet"))
        return sorted(int(found[1]) for found in named if found)

    def tokens(self, step: int | None = None) -> list[dict[str, Any]]:
        """The completions of one step, or of all steps; one mapping per completion. DamagedFile names a broken file."""
        steps = self.token_steps() if step is None else [step]
        if step is not None and step not in self.token_steps():
            raise RunError(f"{self.path} holds no tokens of step {step}; it has {self.token_steps() or 'none at all'}.")
        return [row for each in steps for row in read_rows(self.path / "tokens" / f"step_{each:06d}.parquet")]

    def finish(self, status: str = "finished") -> None:
        """Record how the run ended: finished or failed."""
        if status not in STATUSES:
            raise RunError(f"A run is {', '.join(STATUSES)}; it cannot be {status!r}.")
        self._update(status=status, ended=_now())

    def truncate_after(self, step: int) -> None:
        """Drop every record of a later step: what a run does before it goes on from the checkpoint of `step`."""
        dropped = False
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            records = self._records(name)
            kept = [record for record in records if record["step"] <= step]
            if len(kept) < len(records):
                text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
                replace_file(self.path / name, partial(_write, text))
                dropped = True
        for later in (each for each in self.token_steps() if each > step):
            (self.path / "tokens" / f"step_{later:06d}.parquet").unlink()
            dropped = True
        self._seen.clear()
        if dropped and self.status != "running":
            self._update(status="running")

    def _records(self, name: str) -> list[dict[str, Any]]:
        records = read_lines(self.path / name)
        for number, record in enumerate(records, start=1):
            if not isinstance(record.get("step"), int):
                raise DamagedFile(
                    f"{self.path / name}, record {number} has no step: the file was edited or damaged; remove it."
                )
        return records

    def _update(self, **fields: Any) -> None:
        info = {**self.info, **plain(fields)}
        write_json(self.path / "run.json", info)
        self.info = info

    def _append(self, name: str, record: Mapping[str, Any], key: tuple[str, ...]) -> None:
        if not isinstance(record.get("step"), int):
            raise RunError(f"A record of {name} needs an integer `step`; it has {sorted(record)}.")
        if name not in self._seen:
            self._seen[name] = {tuple(each.get(field) for field in key) for each in self._records(name)}
        identity = tuple(record.get(field) for field in key)
        if identity in self._seen[name]:
            raise RunError(
                f"{self.path / name} already holds step {record['step']}. A run that goes on from a checkpoint calls "
                "truncate_after(step of the checkpoint) first."
            )
        append_line(self.path / name, record)
        self._seen[name].add(identity)
