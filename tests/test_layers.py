"""The layers: what importing a module pulls in, seen from a fresh process."""

import ast
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

# The house from the ground up: a module or package may import those above it in this list, and none below.
FLOORS = (
    *("masked", "rollouts", "credit", "objective", "method", "related", "methods", "silence", "preference", "testing"),
    *("durable", "checkpoints", "exclusive", "here", "lifeline", "limits", "hub", "argument_types", "console"),
    *("settings", "stats", "figure", "agreement", "runs", "budget", "tasks", "train_config", "progress"),
    *(
        "lm",
        "distribute",
        "stages",
        "logs",
        "pivotality",
        "credit_model",
        "scores",
        "dynamics",
        "truth",
        "engines",
        "report",
        "theory",
        "studies",
        "cli",
    ),
)
# The algebra, with what it may import besides torch.
ALGEBRA = {
    "rollouts": (),
    "masked": (),
    "credit": (),
    "objective": (),
    "method": (),
    "methods": (),
    "related": (),
    "silence": (),
    "preference": (),
    "testing": ("hypothesis",),
}
LIGHT = {
    "runs": (),
    "figure": (),
    "checkpoints": (),
    "exclusive": (),
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("heavy")]


def test_the_algebra_needs_torch_alone():
    """Each module is imported first, on its own: what one brings in would show in the ones after it as well."""
    modules = ["tokencredit", *(f"tokencredit.{name}" for name in TORCH_ONLY)]
    assert dict(zip(modules, loaded(*modules))) == {module: set() for module in modules}


def test_what_reads_and_counts_stays_light():
    for module, heavy in zip(LIGHT, loaded(*(f"tokencredit.{name}" for name in LIGHT))):
        assert heavy <= set(LIGHT[module]), module


def test_the_questions_of_the_studies_need_no_model_library():
    """The command line has their flags, and starts without one."""
    assert loaded("tokencredit.studies.table") == [{"yaml"}]


def test_testing_needs_hypothesis_besides():
    assert loaded("tokencredit.testing") == [set(ALGEBRA["testing"])]


@pytest.mark.parametrize("module", ("transformers", "pandas"))
def test_the_check_sees_a_heavy_import(module):
    """A check that cannot fail proves nothing."""
    before, after = loaded("tokencredit", module)
    assert module not in before and module in after


def imports(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, wherever in it the import stands."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokencredit."):
                base = node.module.removeprefix("tokencredit.")
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found[name].add(inner if inner in modules else base)
            elif isinstance(node, ast.Import):
                inner = [alias.name for alias in node.names if alias.name.startswith("tokencredit.")]
                found[name] |= {each.removeprefix("tokencredit.") for each in inner}
            elif isinstance(node, ast.ImportFrom) and node.level:
                raise AssertionError(f"{path}, line {node.lineno}: an import that is relative is not followed here")
            elif isinstance(node, ast.ImportFrom) and node.module == "tokencredit":
                found[name] |= {alias.name for alias in node.names if alias.name in modules}
    return {name: targets - {name} for name, targets in found.items()}


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a package that stands on a higher floor."""
    floor = {name: number for number, name in enumerate(FLOORS)}
    return [
        f"{name} -> {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if floor[target.split(".")[0]] > floor[name.split(".")[0]]
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, however far around."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    found = {tuple(sorted(x for x in graph if x in reach[name] and name in reach[x])) for name in graph}
    return [list(group) for group in sorted(found) if len(group) > 1]


def house() -> dict[str, set[str]]:
    graph = imports(Path(tokencredit.__file__).parent)
    return {name: targets for name, targets in graph.items() if name not in ("__init__", "__main__")}


def test_every_package_has_a_floor_and_imports_no_higher_one():
    graph = house()
    assert {name.split(".")[0] for name in graph} == set(FLOORS)
    assert arrows_up(graph) == []


def test_no_modules_import_each_other():
    assert circles(house()) == []


def test_the_checks_of_the_house_can_fail():
    """An arrow up, and a circle of three through a lazy import, are found."""
    graph = house()
    assert arrows_up(graph | {"lm.text": {"studies.book"}}) == ["lm.text -> studies.book"]
    wrong = graph | {"masked": {"rollouts"}, "rollouts": {"credit.transform"}, "credit.transform": {"masked"}}
    assert {"credit.transform", "masked", "rollouts"} in [set(circle) for circle in circles(wrong)]


def test_every_form_of_import_is_followed(tmp_path):
    (tmp_path / "a.py").write_text("def late():\n    import tokencredit.b\n    from tokencredit.c import name\n")
    (tmp_path / "b.py").write_text("from tokencredit import c\nimport math\n")
    (tmp_path / "c.py").write_text("")
    assert imports(tmp_path) == {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    (tmp_path / "c.py").write_text("from . import b\n")
    with pytest.raises(AssertionError, match="line 1: an import that is relative"):
        imports(tmp_path)


def test_a_class_name_means_one_thing():
    """Public classes of two modules do not share a name."""
    package = Path(tokencredit.__file__).parent
    homes: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(package)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_models_tokenizers_tasks_and_trainers_have_types():
    """No parameter of these names is without a type, or of any type."""
    package = Path(tokencredit.__file__).parent
    loose = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                kind = ast.unparse(each.annotation) if each.annotation else None
                if each.arg in ("model", "tokenizer", "task", "trainer") and kind in (None, "Any", "Any | None"):
                    loose.append(f"{path.relative_to(package)}:{node.lineno} {node.name}({each.arg})")
    assert loose == []
