"""The layers: what importing a module pulls in, seen from a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

import tokencredit

HEAVY = (
    *(
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "safetensors",
        "trl",
        "peft",
        "accelerate",
        "ray",
        "vllm",
        "verl",
    ),
    *("datasets", "pandas", "pyarrow", "scipy", "sklearn", "math_verify", "rich", "yaml", "matplotlib", "playwright"),
    *("pytest", "hypothesis"),
)

# Every module and package of the library has its place here: the algebra, with what it may import besides torch, or
# what stands on it.
ALGEBRA = {
    "rollouts": (),
    "masked": (),
    "credit": (),
    "objective": (),
    "method": (),
    "methods": (),
    "testing": ("hypothesis",),
}
OUTER = {
    "durable",
    "runs",
    "progress",
    "stats",
    "agreement",
    "cli",
    "lm",
    "tasks",
    "pivotality",
    "dynamics",
    "studies",
    "engines",
    "report",
}
LIGHT = {
    "runs": (),
    "report": (),
    "engines": (),
    "stats": ("scipy",),
}  # of the outer modules: no model, no engine on import
TORCH_ONLY = [name for name, more in ALGEBRA.items() if not more]


def loaded(*modules: str) -> list[set[str]]:
    """The HEAVY modules that each import brings into a fresh interpreter, where torch is there already and tokencredit
    never is.
    """
    script = f"""
import importlib, sys, torch
there = set(sys.modules)
for module in {modules!r}:
    for name in set(sys.modules) - there:
        if name.startswith("tokencredit"):
            del sys.modules[name]
    importlib.import_module(module)
    print("heavy", *(name for name in {HEAVY!r} if name in sys.modules and name not in there))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("heavy")]


def test_the_algebra_needs_torch_alone():
    """Each module is imported first, on its own: what one brings in would show in the ones after it as well."""
    modules = ["tokencredit", *(f"tokencredit.{name}" for name in TORCH_ONLY)]
    assert dict(zip(modules, loaded(*modules))) == {module: set() for module in modules}


def test_what_reads_and_counts_stays_light():
    for module, heavy in zip(LIGHT, loaded(*(f"tokencredit.{name}" for name in LIGHT))):
        assert heavy <= set(LIGHT[module]), module


def test_testing_needs_hypothesis_besides():
    assert loaded("tokencredit.testing") == [set(ALGEBRA["testing"])]


@pytest.mark.parametrize("module", ("transformers", "pandas"))
def test_the_check_sees_a_heavy_import(module):
    """A check that cannot fail proves nothing."""
    before, after = loaded("tokencredit", module)
    assert module not in before and module in after


def test_every_module_has_a_layer():
    package = Path(tokencredit.__file__).parent
    there = {p.stem for p in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    there -= {"__init__", "__main__"}
    assert there <= set(ALGEBRA) | OUTER, f"no layer is given for {sorted(there - set(ALGEBRA) - OUTER)}"
    assert set(ALGEBRA) <= there
