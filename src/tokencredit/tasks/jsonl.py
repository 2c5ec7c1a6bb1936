"""Any JSONL or Parquet file with a column of prompts and one of gold answers, verified with math-verify or with your
own function.
"""

import difflib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from tokencredit.tasks import answers, data
from tokencredit.tasks.answers import Limits
from tokencredit.tasks.task import MAX_NEW_TOKENS, Task
from tokencredit.tasks.templates import template_of
from tokencredit.tasks.verdict import Validation, Verdict, as_verifier

VERL_ANSWER = "reward_model.ground_truth"
"""Where the data that verl is given has the gold answer."""


def verify(completion: str, row: dict[str, Any], truncated: bool = False) -> Verdict:
    """The verdict on a completion by the row's "answer", in any of the accepted forms."""
    return answers.verify(completion, gold_of(row["answer"]), truncated)


def gold_of(answer: Any) -> str:
    r"""The gold answer in a column: what is marked by ``<answer>``, ``\boxed`` or ``####``, as in a worked solution,
    else all of it.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise TypeError(f"an answer is text or a number, not {type(answer).__name__}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise TypeError(f"an answer is text or a number, not {answer} (a missing value?)")
    text = str(answer).strip()
    marked = answers.extract(text)
    return marked.text if marked else text


@dataclass(frozen=True)
class Jsonl:
    """Prompts and gold answers from the columns `prompt` and `answer` of a file; a prompt is text or chat messages.

    Without a `test` file, a fifth of the prompts (by hash) is the test part. `template` puts text prompts into words
    and asks for a form of answer; `strict` then accepts that form alone. `verifier` is a function ``(completion, row)
    -> Verdict | bool``, or its name, ``module:function`` or ``file.py:function``; then the answers are handed to it as
    they stand, and may be missing. It runs in a process of its own (`isolated`).

    Dots in the name of a column go down into objects, `extra_info.question`. Where there is no column "answer", verl's
    `reward_model.ground_truth` is it.

    timeout     CPU time in seconds that comparing one answer, or one call of the verifier, may take; None calls a
                verifier of your own in this process, without limit
    evaluated   where the gold answer is a plain number, an answer has to be a finished number: `123*456` is none
    """

    path: str
    prompt: str = "prompt"
    answer: str = "answer"
    template: str | None = None
    verifier: Callable[..., Any] | str | None = None
    test: str | None = None
    strict: bool = False
    timeout: float | None = Limits.seconds
    evaluated: bool = True

    name = "jsonl"
    max_new_tokens = MAX_NEW_TOKENS
    _verify: ClassVar[Callable[..., Verdict]]

    def __post_init__(self) -> None:
        if self.template is not None:
            template_of(self.template)
        elif self.strict:
            raise ValueError("strict accepts only the form a template asks for: give a template as well")
        if self.verifier is None and self.timeout is None:
            raise ValueError("comparing answers takes a limit of time: timeout=None is for a verifier of your own")
        if self.verifier is not None:
            object.__setattr__(self, "_verify", as_verifier(_function(self.verifier), timeout=self.timeout))

    def rows(self, split: data.Split = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The rows of a part: the file's columns, with "prompt", "answer" and "row_id" set. `limit` draws that many by
        `seed`.
        """
        data.check_split(split)
        path = self.test if self.test is not None and split == "test" else self.path
        rows = [self._row(name, row, path) for name, row in data.read(path)]
        if self.test is None:
            rows = [row for row in rows if data.split_of(row["prompt"]) == split]
        return data.take(rows, limit, seed)

    def verify(self, completion: str, row: dict[str, Any], truncated: bool = False) -> Verdict:
        """The verdict of the verifier given, else of math-verify."""
        if self.verifier is not None:
            return self._verify(completion, row, truncated)
        forms = template_of(self.template).forms(self.strict) if self.template else answers.FORMS
        limits = Limits(seconds=self.timeout)
        return answers.verify(completion, row["answer"], truncated, forms, limits, self.evaluated)

    def files(self) -> list[Path]:
        """The file, and that of the test part."""
        return [Path(self.path)] + ([Path(self.test)] if self.test else [])

    def validate(self) -> Validation:
        """Put every gold answer, in the template's form, through the verifier."""
        return check_golds(self, template_of(self.template or "boxed").answer)

    def _row(self, name: str, row: dict[str, Any], path: str) -> dict[str, Any]:
        prompt = _column(row, self.prompt, name, "prompt", "prompt", path)
        if self.verifier is None:
            nested = self.answer == "answer" and "answer" not in row and data.inner(row, VERL_ANSWER) is not None
            answer = _column(row, VERL_ANSWER if nested else self.answer, name, "answer", "answer", path)
            try:
                answer = gold_of(answer)
            except TypeError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        else:
            answer = data.inner(row, self.answer)
        if self.template:
            prompt = template_of(self.template).prompt(prompt)
        return {**row, "prompt": prompt, "answer": answer, "row_id": name}


def check_golds(task: Task, answer_form: Callable[[str], str]) -> Validation:
    """The validation of a task with files: every row of both parts that has a gold answer, answered by it."""
    failures, checked = [], 0
    for split in ("train", "test"):
        for row in task.rows(split):
            if row["answer"] is None:  # an own verifier may do without; there is nothing to check then
                continue
            checked += 1
            verdict = task.verify(answer_form(str(row["answer"])), row)
            if not verdict.correct:
                failures.append(f"{row['row_id']}: {str(row['answer'])[:80]!r}: {verdict.reason}")
    return Validation(checked, tuple(failures))


def _column(row: dict[str, Any], column: str, name: str, what: str, option: str, path: str) -> Any:
    value = data.inner(row, column)
    if value is None or (isinstance(value, str | list) and not value) or (isinstance(value, str) and not value.strip()):
        state = "is empty" if column.split(".")[0] in row else "is missing"
        near = difflib.get_close_matches(column, row, n=1, cutoff=0.5) if column not in row else []
        hint = f"; did you mean {option}={near[0]!r}?" if near else ""
        raise ValueError(
            f"{path}: {name}: no {what} (column {column!r} {state}; the row has: {', '.join(map(str, row))}{hint})"
        )
    if option == "prompt" and not isinstance(value, str):
        _check_messages(value, name, path)
    return value


def _check_messages(value: Any, name: str, path: str) -> None:
    fits = isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )
    if not fits:
        raise ValueError(
            f"{path}: {name}: a prompt is text or a list of messages with role and content, not {str(value)[:60]!r}"
        )


def _function(verifier: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function itself, or the one named ``module:function`` or ``file.py:function``."""
    if callable(verifier):
        return verifier
    place, colon, attribute = verifier.rpartition(":")
    if not (place and colon and attribute):
        raise ValueError(f"a verifier is named 'module:function' or 'file.py:function', not {verifier!r}")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise FileNotFoundError(f"no such file: {place} (named by the verifier {verifier!r})")
        module = _module_in(Path(place).resolve())
    else:
        module = importlib.import_module(place)
    if not callable(function := getattr(module, attribute, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no function {attribute!r}; it has: {', '.join(functions) or 'none'}")
    return function


def _module_in(path: Path) -> ModuleType:
    """The module in a file. Dataclasses and `inspect` look for it in `sys.modules`, where its name hides no library."""
    name = "_verifier" + re.sub(r"\W", "_", str(path.with_suffix("")))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
