"""What `import tokencredit` offers: every name exists, and dir() and type checkers are told of the same ones."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import tokencredit as tc
from tokencredit import credit, objective

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", tc.__all__)
def test_every_name_is_there(name):
    assert getattr(tc, name) is not None and name in dir(tc)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(tc.__file__).read_text())
    [typed, *_] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = [alias.name for node in typed.body for alias in node.names]
    assert sorted([*imported, "__version__"]) == sorted(tc.__all__)
    assert (Path(tc.__file__).parent / "py.typed").exists()


def test_all_transforms_surrogates_and_aggregates_are_offered():
    parts = {name for module in (credit, objective) for name in module.__all__ if not name.islower()}
    assert parts <= set(tc.__all__)


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'tokencredit' has no attribute 'GroupCentre'"):
        tc.GroupCentre  # noqa: B018


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tokencredit.__version__"}
    assert importlib.metadata.version("tokencredit") == tc.__version__
    assert f"## {tc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_entry_of_the_log_has_its_date():
    titles = re.findall(r"^\*\*(.+)", (ROOT / "LOG.md").read_text(), re.M)
    assert len(titles) > 20
    assert [title for title in titles if not re.match(r"\d{4}-\d\d-\d\d: ", title)] == []
