"""The words that the verifier knows, read from `vocabulary.txt`: units, count nouns, names of numbers and functions."""

from importlib.resources import files


def _lists() -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for line in files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lists[name := line.strip("[]")] = []
        elif line and not line.startswith("#"):
            lists[name] += [line] if name == "measures" else line.split()
    return lists


WORDS = _lists()
