"""Prompts whose answers can be verified.

A task has a `name`, `rows(split, limit, seed)` (dicts with "prompt" and "answer"), `verify(completion, row, truncated)
-> Verdict` and `validate() -> Validation`. `load` makes one from a name, a data file, or a function of your own.
"""

import difflib
import inspect
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from tokencredit.tasks.task import Task
from tokencredit.tasks.verdict import Validation, Verdict, VerifierError, as_verifier

__all__ = ["TASKS", "Task", "Validation", "Verdict", "VerifierError", "as_verifier", "load"]

TASKS = {
    "reckon": ("tokencredit.tasks.reckon", "Reckon"),
    "stories": ("tokencredit.tasks.stories", "Stories"),
    "gsm8k": ("tokencredit.tasks.gsm8k", "Gsm8k"),
    "jsonl": ("tokencredit.tasks.jsonl", "Jsonl"),
    "given": ("tokencredit.tasks.given", "Given"),
}


def load(name: str, **options: Any) -> Task:
    """The task called `name`, with `options` handed to its class.

    - ``load("reckon")``, ``load("gsm8k", path="data/gsm8k", template="boxed")``: a name of `TASKS`
    - ``load("jsonl:train.jsonl", prompt="question")``, ``load("train.parquet")``: a data file and math-verify
    - ``load("my_module:verify", path="train.jsonl")``, ``load("verify.py:verify", path=...)``: your own verifier
    """
    if name in TASKS:
        return _build(name, options)
    if name.startswith("jsonl:"):
        return _build("jsonl", {"path": name.removeprefix("jsonl:"), **options})
    if name.endswith((".jsonl", ".parquet")):
        return _build("jsonl", {"path": name, **options})
    if ":" in name:
        if "path" not in options:
            raise ValueError(
                f"{name!r} names a verifier; it also needs data: load({name!r}, path='train.jsonl'), or on the command"
                " line --option path=train.jsonl"
            )
        return _build("jsonl", {"verifier": name, **options})
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = f"{', '.join(TASKS)}; or a file ending in .jsonl or .parquet; or 'module:function' with path=..."
    raise ValueError(f"unknown task {name!r}.{hint} Tasks: {known}")


def named(task: Task) -> tuple[str, dict[str, Any]]:
    """(name, options) of which `load` makes the task again; ("", {}) where nothing that a file can hold does."""
    if not is_dataclass(task) or task.name not in TASKS:
        return "", {}
    options = {f.name: value for f in fields(task) if (value := getattr(task, f.name)) != f.default}
    kept = all(value is None or isinstance(value, str | int | float | bool) for value in options.values())
    return (task.name, options) if kept and load(task.name, **options) == task else ("", {})


def _build(name: str, options: dict[str, Any]) -> Task:
    module, attribute = TASKS[name]
    task = getattr(import_module(module), attribute)
    known = inspect.signature(task).parameters
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"task {name!r} has no option {option!r}.{hint} Its options: {', '.join(known) or 'none'}")
    missing = [
        key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        raise TypeError(f"task {name!r} needs {', '.join(missing)}: load({name!r}, {missing[0]}=...)")
    return task(**options)
