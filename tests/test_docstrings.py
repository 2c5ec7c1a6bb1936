"""The examples in docstrings run and print what they say.

They may use `rollouts`: one group of four completions of two tokens with rewards 1, 0, 0, 1 and entropies from 1 to 3;
and `credit`, their rewards at every token.
"""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import tokencredit as tc

PACKAGE = Path(tc.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def names():
    entropy = torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [3.0, 1.0]])
    reward, mask = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.ones(4, 2, dtype=torch.bool)
    rollouts = tc.Rollouts(
        reward=reward, group=torch.zeros(4, dtype=torch.long), mask=mask, scores={"entropy": entropy}
    )
    credit = tc.Outcome()(torch.zeros(4, 2), rollouts)
    parts = {name: getattr(tc, name) for name in ("METHODS", "Chain", "GroupCenter", "Outcome")}
    return {"torch": torch, "rollouts": rollouts, "credit": credit, **parts}


def examples(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    return [test for test in doctest.DocTestFinder().find(module, extraglobs=names()) if test.examples]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_examples_of_a_module_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = examples(path)
    assert found, "the module has an example that is in no docstring"
    for each in found:
        heard = []
        doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(each, out=heard.append)
        assert not heard, "".join(heard)


def test_an_example_that_prints_something_else_is_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    heard = []
    assert doctest.DocTestRunner().run(wrong, out=heard.append).failed == 1 and heard
