"""GSM8K: grade-school word problems with integer answers (Cobbe et al., arXiv:2110.14168), from the Hugging Face hub or
from files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencredit import hub
from tokencredit.tasks import answers, data
from tokencredit.tasks.answers import Limits
from tokencredit.tasks.jsonl import check_golds, gold_of
from tokencredit.tasks.task import MAX_NEW_TOKENS
from tokencredit.tasks.templates import template_of
from tokencredit.tasks.verdict import Validation, Verdict

HUB = ("openai/gsm8k", "main")


def verify(completion: str, row: dict[str, Any], truncated: bool = False) -> Verdict:
    """The verdict on a completion by the row's "answer", which may be the dataset's own (a solution ending in ``####
    gold``).
    """
    return answers.verify(completion, gold_of(row["answer"]), truncated)


@dataclass(frozen=True)
class Gsm8k:
    """GSM8K's problems in the words of a `template` ("r1", "plain" or "boxed"), as messages when `chat`.

    `path` is a directory with files whose names begin with train and test, or one file (a fifth of it, by hash, is then
    the test part), in JSONL or Parquet with the columns "question" and "answer"; without it, the hub's
    ``openai/gsm8k``. `strict` accepts only the form of answer that the template asks for; `timeout` is the CPU time in
    seconds that comparing one answer may take. `evaluated` asks for a finished number: `6 \\cdot 7` does not answer 42.
    """

    path: str | None = None
    template: str = "r1"
    chat: bool = False
    strict: bool = False
    timeout: float = Limits.seconds
    evaluated: bool = True

    name = "gsm8k"
    max_new_tokens = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        template_of(self.template)

    def rows(self, split: data.Split = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The rows of a part: "prompt", "answer" (after ``####``), "question", "solution", "row_id". `limit` draws that
        many by `seed`.
        """
        data.check_split(split)
        return data.take([self._row(name, row) for name, row in self._raw(split)], limit, seed)

    def verify(self, completion: str, row: dict[str, Any], truncated: bool = False) -> Verdict:
        """The verdict on a completion of the row's prompt."""
        forms = template_of(self.template).forms(self.strict)
        limits = Limits(seconds=self.timeout)
        return answers.verify(completion, gold_of(row["answer"]), truncated, forms, limits, self.evaluated)

    def validate(self) -> Validation:
        """Put every gold answer, in the template's form, through the verifier."""
        return check_golds(self, template_of(self.template).answer)

    def files(self) -> list[Path]:
        """The file, or those of both parts in the directory; none of the hub's."""
        if self.path is None:
            return []
        place = Path(self.path)
        return [*_files_of(place, "train"), *_files_of(place, "test")] if place.is_dir() else [place]

    def _row(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        for column in ("question", "answer"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise ValueError(
                    f"{name}: no {column} (the row has: {', '.join(row)}); GSM8K's columns are question and answer"
                )
        if "####" not in row["answer"]:
            raise ValueError(
                f"{name}: the answer has no '####' before the gold answer; for other data use the task 'jsonl'"
            )
        prompt = template_of(self.template).prompt(row["question"], self.chat)
        gold = row["answer"].rpartition("####")[2].strip()
        return {
            "prompt": prompt,
            "answer": gold,
            "question": row["question"],
            "solution": row["answer"],
            "row_id": name,
        }

    def _raw(self, split: data.Split) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.path is None:
            return _from_hub(split)
        if Path(self.path).is_dir():
            return data.read(_file_of(Path(self.path), split))
        return ((name, row) for name, row in data.read(self.path) if data.split_of(row.get("question")) == split)


def _files_of(directory: Path, split: data.Split) -> list[Path]:
    places = (directory, directory / "main")
    return [file for place in places for suffix in data.SUFFIXES for file in sorted(place.glob(f"{split}*{suffix}"))]


def _file_of(directory: Path, split: data.Split) -> Path:
    """The one file of a part in `directory`, or in the directory "main" that the hub's layout has."""
    files = _files_of(directory, split)
    if len(files) != 1:
        present = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
        raise FileNotFoundError(
            f"{directory}: exactly one file {split}*.jsonl or {split}*.parquet is needed, {len(files)} fit (there are: "
            f"{', '.join(present[:8]) or 'no files'})"
        )
    return files[0]


def _from_hub(split: data.Split) -> Iterator[tuple[str, dict[str, Any]]]:
    there = hub.reachable()
    import datasets

    try:
        rows = datasets.load_dataset(*HUB, split=split)
    except Exception as error:
        instead = (
            "give the files, path=DIRECTORY (on the command line --option path=DIRECTORY) with train*.jsonl and"
            " test*.jsonl, or *.parquet as the hub has them"
        )
        if not there:
            raise RuntimeError(hub.without(f"the data set {HUB[0]}", instead)) from error
        raise RuntimeError(
            f"{HUB[0]} could not be loaded from the hub ({type(error).__name__}: {error}); {instead}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{HUB[0]} {split}, row {number}", row
