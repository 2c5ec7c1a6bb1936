"""The frame of the studies: every study has its parts, flags are those of its configuration, a page computes nothing,
and what earlier versions wrote is read.
"""

import argparse
import ast
import json
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest

import tokencredit
from tokencredit.cli import main, make_parser
from tokencredit.runs import Run, RunError
from tokencredit.stats import Estimate
from tokencredit.studies.attribution.question import AttributeConfig
from tokencredit.studies.book import Book
from tokencredit.studies.entropy.question import SweepConfig
from tokencredit.studies.noise_scale.question import NoiseScaleConfig
from tokencredit.studies.options import add_flags, check_choices, option, read, told
from tokencredit.studies.result import FORMAT, read_result, write_result
from tokencredit.studies.study import Work
from tokencredit.studies.table import STUDIES, study_in

PACKAGE = Path(tokencredit.__file__).parent
SAME = {"task": "reckon", "model": "reckon", "config": {"prompts": 8}, "seed": 0, "command": "c"}


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_study_has_its_parts(study):
    assert (PACKAGE / "studies" / study.name / "question.py").exists()
    assert callable(study.part("study").run) and callable(study.part("tables").tables)
    assert callable(study.part("page").sections)
    assert is_dataclass(study.config) and "seed" in {each.name for each in fields(study.config)}
    needed = {"logs": ("a.jsonl",)} if study.name == "inspect" else {}
    study.config(**needed)  # its defaults are a question that can be asked


FOUR = "the train part of gsm8k has 4 prompts. "


@pytest.mark.parametrize(
    "asked, said",
    [
        ("dynamics entropy --eval-prompts 64", f"--eval-prompts 64: {FOUR}8 at least are needed"),
        ("dynamics entropy", f"--eval-prompts (its default): {FOUR}8 at least are needed"),
        ("dynamics attribute --prompts 9", f"--prompts 9: {FOUR}Ask for 4 at most, or leave it out"),
        ("dynamics attribute --reward 9 4", f"--reward 9: {FOUR}Ask for 4 at most, or leave it out"),
        ("dynamics noise-scale --prompts 64", f"--prompts 64: {FOUR}Ask for 4 at most, or leave it out"),
        ("study variance --prompts 64", f"--prompts 64: {FOUR}8 at least are needed"),
    ],
)
def test_prompts_that_a_task_does_not_have_are_refused_by_flag_before_a_model_is_opened(
    asked, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tokencredit.dynamics.checkpoint.load_model", lambda *_, **__: pytest.fail("it was opened"))
    rows = [{"question": f"What is {a} + 1?", "answer": f"#### {a + 1}"} for a in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--task", "gsm8k", "--option", f"path={tmp_path}"]
    assert main([*asked.split(), *task, "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "out").exists()


def test_default_numbers_of_prompts_are_at_most_what_the_task_has():
    assert NoiseScaleConfig().fitted(4).prompts == 4 and NoiseScaleConfig().fitted(None).prompts == 64
    found = AttributeConfig().fitted(1, 4)
    assert (found.prompts, found.entropy, found.reward) == (4, (4, 4), (4, 8))
    assert SweepConfig().fitted(1, 20).prompts == 20 and SweepConfig(prompts=3).fitted(1, 20).prompts == 3


def test_every_folder_is_in_the_table():
    assert {path.parent.name for path in PACKAGE.glob("studies/*/question.py")} == set(STUDIES)


STANDARD = {"__future__", "collections", "dataclasses", "functools", "math", "pathlib", "typing"}
ALLOWED = {"page": ("report", "runs", "figure"), "report": ("report", "runs", "durable", "figure")}
MORE = {"report": {"base64", "collections", "hashlib", "html", "importlib", "json", "os", "re"}, "page": set()}
WORDS = "tokencredit.lm.prompts"  # how a prompt is read: text, and no number


def computing(source, kind):
    """What a page, or a part of the report, imports that it may not: anything that computes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules = (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{each.name}" for each in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for module in modules:
            top, _, rest = module.partition(".")
            own = top == "tokencredit" and rest.split(".")[0] in ALLOWED[kind]
            if not own and top not in STANDARD | MORE[kind] and not module.startswith(f"{WORDS}."):
                found.add(module)
    return found


PAGES = [
    *((path, "page") for path in PACKAGE.glob("studies/*/page.py")),
    *((p, "report") for p in PACKAGE.glob("report/*.py")),
]


@pytest.mark.parametrize("path, kind", PAGES, ids=[str(path.relative_to(PACKAGE)) for path, _ in PAGES])
def test_a_page_imports_nothing_that_computes(path, kind):
    assert computing(path.read_text(), kind) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from tokencredit.stats import holm",
        "import numpy as np",
        "from tokencredit import stats",
        "from scipy.stats import t",
        "def f():\n    from tokencredit.studies.kernel.figures import study_of",
    ],
)
def test_the_check_sees_what_computes(line):
    """A check that cannot fail proves nothing."""
    assert len(computing(f"import math\nfrom tokencredit.report import tokens\n{line}\n", "page")) == 1


# --- flags ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One field of every kind."""

    prompts: int = option(64, "prompts")
    rate: float | None = option(None, "a rate, 5 % say (default: the run's own)")
    name: str = option("x", "a name", flag="--called")
    kind: Literal["a", "b"] | None = option(None, "which")
    rates: tuple[float, ...] = option((0.5, 1.0), "several")
    size: tuple[int, int] = option((8, 4), "prompts and rollouts")
    paths: dict[str, str] = option(dict, "named")
    level: str = option("low", "how far", consts={"--low": "low", "--high": "high"})
    quick: bool = option(False, "in a hurry")
    hidden: int = 3
    seed: int = option(0, "of everything")


def parsed(*argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    add_flags(parser, Asked)
    return parser, read(parser.parse_args(argv), Asked, {"prompts": 8, "rates": (1.0,)})


def test_flags_are_the_fields_of_a_configuration():
    parser, config = parsed()
    assert config == Asked()
    _, config = parsed(
        *("--prompts", "9", "--rate", "0.5", "--called", "y", "--kind", "b", "--rates", "1", "2", "--size", "3", "2"),
        *("--paths", "a=b=c", "--paths", "d=e", "--high", "--quick", "--seed", "7"),
    )
    assert config == Asked(9, 0.5, "y", "b", (1.0, 2.0), (3, 2), {"a": "b=c", "d": "e"}, "high", True, 3, 7)
    text = " ".join(parser.format_help().split())
    assert "prompts (default: 64)" in text and "several (default: 0.5 1)" in text and "5 % say (default: the" in text
    assert "hidden" not in text and "--called" in text


@pytest.mark.parametrize("wrong", [("--kind", "c"), ("--low", "--high"), ("--size", "3"), ("--prompts", "x")])
def test_what_no_field_can_hold_is_refused_by_name(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(*wrong)
    assert wrong[0].removeprefix("--low") in capsys.readouterr().err


def test_the_command_line_is_made_without_a_model_library():
    """Every flag and every default, in a fresh process."""
    script = "import sys\nfrom tokencredit.cli import make_parser\nmake_parser()\nprint(*(m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "tokencredit.studies.kernel.question" in done.stdout.split()
    assert not {"torch", "transformers", "scipy", "pyarrow"} & set(done.stdout.split())


def test_a_label_has_a_path():
    with pytest.raises(ValueError, match="LABEL=PATH, not 'x'"):
        parsed("--paths", "x")


def test_values_of_a_fixed_set_are_checked_without_a_command_line():
    check_choices(Asked())
    with pytest.raises(ValueError, match="kind is one of a, b, not 'c'"):
        check_choices(Asked(kind="c"))


def test_what_small_says_is_what_it_does():
    """In words made from the numbers; what is given besides counts."""
    assert told({"prompts": 8, "rates": (1.0,)}, Asked) == "prompts 8, not 64; rates 1, not 0.5 1"
    assert parsed("--small")[1] == Asked(prompts=8, rates=(1.0,))
    assert parsed("--small", "--prompts", "12")[1] == Asked(prompts=12, rates=(1.0,))
    for study in STUDIES.values():
        if study.small:
            action = study.action or study.name.replace("_", "-")
            config = study.read(make_parser().parse_args([study.group, action, "--small"]))
            assert {name: getattr(config, name) for name in study.small} == dict(study.small)
            assert all(getattr(study.config(), name) != value for name, value in study.small.items())


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_study_says_in_its_directory_what_it_is(tmp_path):
    work = Work("kernel", Asked(), tmp_path / "out", Book("tokencredit <x>", 5))
    assert not (tmp_path / "out").exists(), "nothing is made before it begins"
    work.begin(task="reckon", model="m", judge=None, checkpoint="m/checkpoint-3")
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (info["kind"], info["study"], info["seed"], info["command"]) == ("study", "kernel", 5, "tokencredit <x>")
    assert info["config"]["prompts"] == 64 and info["config"]["checkpoint"] == "m/checkpoint-3"
    assert "method" not in info and "method_name" not in info
    again = Work("kernel", Asked(prompts=9), tmp_path / "out", Book("c", 5))
    with pytest.raises(RunError, match=r"config\.prompts: 64 in the directory, 9 asked for"):
        again.begin(task="reckon", model="m", judge=None, checkpoint="m/checkpoint-3")
    with pytest.raises(RunError, match="kind: 'study' in the directory, 'training' asked for"):
        Run.create(tmp_path / "out", name="out", method="m", method_name="grpo", **SAME)


def test_a_result_is_written_and_read_in_one_place(tmp_path):
    book = Book("c", 1)
    book.enter("a", Estimate(0.5, 0.25, float("inf"), 8), "nats", p=0.5)
    write_result(tmp_path, {"study": "kernel", "command": "c", "seed": 1, "figures": book.figures, "num": {"x": 3}})
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["format"] == FORMAT and stored["figures"]["a"]["value"] == 0.5
    result = read_result(tmp_path)
    assert result["figures"] == book.figures and result["num"] == {"x": 3}
    assert study_in(tmp_path) is STUDIES["kernel"]
    (tmp_path / "result.json").write_text(json.dumps(stored | {"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}"):
        read_result(tmp_path)
    with pytest.raises(ValueError, match="no finished study"):
        read_result(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "told, name",
    [
        ({"study": "entropy dynamics"}, "entropy"),
        ({"question": "noise-scale"}, "noise_scale"),
        ({"study": "kernel"}, "kernel"),
    ],
)
def test_results_of_earlier_versions_are_found_by_their_name(tmp_path, told, name):
    figure = {"value": 1.0, "low": None, "high": 2.0, "num": 3}
    (tmp_path / "result.json").write_text(json.dumps({**told, "figures": {"a": figure}}))
    assert study_in(tmp_path) is STUDIES[name]
    result = read_result(tmp_path)
    assert result["study"] == name and result["figures"]["a"].high == 2.0
    (tmp_path / "result.json").write_text('{"figures": {}}')
    assert study_in(tmp_path) is None


def test_the_policy_of_an_earlier_result_is_found(tmp_path):
    config = {"model": "m", "task": "reckon", "temperature": 0.5, "prompts": 8}
    (tmp_path / "result.json").write_text(json.dumps({"study": "correlation", "config": config}))
    assert read_result(tmp_path)["config"]["policy"] == {"model": "m", "task": "reckon", "temperature": 0.5}


def test_directories_of_earlier_versions_go_on(tmp_path):
    """A study posed as a training run, its name for a method's; a training run did not say what it was."""
    posed = {"name": "x", "method": "Fisher kernel", "method_name": "kernel"}
    for name, own in (("study", posed), ("run", {"name": "run", "method": "m", "method_name": "grpo"})):
        (tmp_path / name).mkdir()
        info = {"format": 1, **own, **SAME, "status": "running"}
        (tmp_path / name / "run.json").write_text(json.dumps(info))
    assert Run.open(tmp_path / "study").kind == "study" and Run.open(tmp_path / "run").kind == "training"
    assert Run.create_study(tmp_path / "study", study="kernel", **SAME).info["resumed"]
    assert Run.create(tmp_path / "run", name="run", method="m", method_name="grpo", **SAME).info["resumed"]
    with pytest.raises(RunError, match="study: 'kernel' in the directory, 'variance' asked for"):
        Run.create_study(tmp_path / "study", study="variance", **SAME)
