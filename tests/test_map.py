"""README's tree and CONTRIBUTING's map name what exists, and the tree names all of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tokencredit"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def tree() -> str:
    return re.search(r"^src/tokencredit/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]


def test_the_tree_of_the_readme_names_every_room():
    """Modules and packages at the top; a line may speak of several."""
    modules = {path.name for path in PACKAGE.glob("[a-z]*.py")}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    named = set(re.findall(r"\b[a-z_]+(?:\.py|/)", tree()))
    rooms = set(re.findall(r"^  (\S+)", tree(), re.M))
    assert modules | packages <= named
    assert rooms <= modules | packages


def test_every_row_of_the_map_names_what_exists():
    """A path stands by itself, or in the folder that the row names first."""
    rows = [row for row in CONTRIBUTING.splitlines() if row.startswith("| ") and "`" in row]
    assert len(rows) > 25
    lost = [(path, row) for row in rows for path in _lost(row)]
    assert not lost


def _lost(row: str) -> list[str]:
    named = re.findall(r"`([\w./]+(?:\.py|\.md|\.txt|/))`", row.replace("NAME", "compare"))
    folders = [PACKAGE, ROOT, *(PACKAGE / Path(path) for path in named if path.endswith("/"))]
    folders += [(PACKAGE / path).parent for path in named if "/" in path.rstrip("/")]
    return [path for path in named if not any((folder / path).exists() for folder in folders)]


@pytest.mark.parametrize(
    "row", ["| x | `credit/`: `baselines.py`, `gone.py` |", "| x | `gone.py` |", "| x | `gone/` |"]
)
def test_a_row_that_names_what_is_gone_is_seen(row):
    assert _lost(row)


def test_the_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.M)}
    assert len(named) > 5 and named <= targets
