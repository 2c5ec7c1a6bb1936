"""One page of many directories: tasks apart, pivotality runs with pivotal tokens first, one completion under several
kinds of credit.
"""

import json
import re

import numpy as np
import pytest

from test_report import HOSTILE, curve, make_run, row
from tokencredit import report
from tokencredit.durable import write_json, write_parquet
from tokencredit.pivotality.view import views
from tokencredit.report.credits import CreditKind, credits_section
from tokencredit.runs import Run
from tokencredit.studies.learning import comparable, find_runs
from tokencredit.studies.pages import write_page

MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "2 + 2?"}]


def run_of(path, task, seed=0, **config):
    run = Run.create(
        path,
        name=path.name,
        method="m",
        method_name="grpo",
        task=task,
        model="tiny",
        config={"steps": 2, **config},
        seed=seed,
        command="c",
    )
    for step in (1, 2):
        run.log_metrics({"step": step, "seconds": 1.0, "reward": step / 2})
    run.finish()
    return path


def headings(page):
    return re.findall(r"<h2[^>]*>([^<]*)", page.read_text())


def test_runs_that_cannot_be_compared_are_kept_apart(tmp_path):
    """By task, and by what else differs within a task; seeds of one setting stay together."""
    run_of(tmp_path / "a", "reckon", temperature=1.0)
    run_of(tmp_path / "b", "reckon", seed=1, temperature=1.0)
    run_of(tmp_path / "c", "reckon", temperature=0.6)
    run_of(tmp_path / "d", "/far/away/verify.py:last", temperature=1.0)
    groups = comparable(find_runs([tmp_path]))
    assert {name: [path.name for path in paths] for name, paths in groups.items()} == {
        "reckon, temperature 1.0": ["a", "b"],
        "reckon, temperature 0.6": ["c"],
        "verify.py:last": ["d"],
    }
    found = headings(write_page(find_runs([tmp_path]), tmp_path / "page.html"))
    assert found[:3] == [f"reckon, temperature 1.0: {name}" for name in ("What was run", "Methods", "Training curves")]
    assert [name.split(":")[0] for name in found[3:]] == ["reckon, temperature 0.6"] * 3 + ["verify.py"] * 3
    [contents] = re.findall(r"<nav.*</nav>", (tmp_path / "page.html").read_text())
    assert contents.count("temperature 0.6<") == 1 and contents.count(">What was run</a>") == 3
    alone = headings(write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    assert alone == ["What was run", "Methods", "Training curves"], "one group needs no name"


def pivots(folder, prompt="2 + 2?"):
    """A finished run of two completions of four tokens; the second has the largest effect, the first one a sure but
    negligible one, and the last token has no alternative.
    """
    effects = [[0.01, 0.0, 0.2, None], [0.0, -0.75, 0.0, None]]
    tokens, alternatives, traces = [], [], []
    for number, values in enumerate(effects):
        start = 0.5
        traces.append(
            {
                "trace": number,
                "row": json.dumps({"prompt": prompt}),
                "reward": 1.0 - number,
                "reason": "<i>r</i>",
                "start": start,
                "start_standard_error": 0.1,
            }
        )
        for at, value in enumerate(values):
            low, high = (
                (None, None) if value is None else (value - 0.005 - abs(value) / 4, value + 0.005 + abs(value) / 4)
            )
            start = min(max(start + (value or 0), 0), 1)
            tokens.append(
                {"trace": number, "position": at, "token": HOSTILE[at], "probability": 0.5, "entropy": 0.25}
                | {"value_after": start, "value_after_standard_error": 0.05}
                | {
                    f"{name}{end}": shown
                    for name in ("replace", "before_after")
                    for end, shown in (
                        ("", value),
                        ("_standard_error", None if value is None else 0.01),
                        ("_low", low),
                        ("_high", high),
                    )
                }
            )
        alternatives.append({"trace": number, "position": 1, "token": "<u>x</u>", "rollouts": 4, "successes": 1.0})
        alternatives.append({"trace": number, "position": 1, "token": "y", "rollouts": 8, "successes": 8.0})
    import pyarrow as arrow

    for name, rows in (("tokens", tokens), ("alternatives", alternatives), ("traces", traces)):
        write_parquet(folder / f"{name}.parquet", arrow.Table.from_pylist(rows))
    policy = {"model": "tiny <m>", "task": "reckon", "temperature": 1.0}
    figures = {"tokens": {"value": 8, "unit": "tokens"}, "start": {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "p"}}
    write_json(folder / "result.json", {"command": "tokencredit <x>", "policy": policy, "figures": figures})
    return folder


def test_completions_with_pivotal_tokens_come_first_and_small_effects_are_not_pivotal(tmp_path):
    first, second = views(pivots(tmp_path / "pivots", MESSAGES))
    assert not first["correct"] and first["pivotal"]["before_after"] == [False, True, False, False]
    assert second["pivotal"]["before_after"] == [False, False, True, False], "0.01 is sure, and matters to nobody"
    assert first["prompt"] == MESSAGES and np.isnan(first["before_after"]["value"][3])
    assert first["value"] == [0.5, 0.5, 0.0, 0.0, 0.0] and first["low"][0] == pytest.approx(0.5 - 0.196)
    assert first["alternatives"][1] == [
        {"text": "y", "num": 8, "correct": 8.0},
        {"text": "<u>x</u>", "num": 4, "correct": 1.0},
    ]
    assert 0.99 < first["before_after"]["certainty"][1] <= 1 and first["before_after"]["certainty"][2] == 0


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    """A pivotality run, then one completion under two kinds of credit."""
    folder = tmp_path_factory.mktemp("pages")
    pivots(folder / "pivots", MESSAGES)
    write_page([folder / "pivots"], folder / "alone.html")
    from tokencredit.studies.pages import sections_of

    rows = [row(MESSAGES, HOSTILE, False, exact=[0.5] + [0.0] * (len(HOSTILE) - 1)), row("b", ["", "x"], True)]
    kinds = [CreditKind("credit", "GRPO <b>", "the outcome"), CreditKind("exact", "exact")]
    section = credits_section("Kinds", rows, kinds, "One & two.")
    return report.write_sections([*sections_of([folder / "pivots"]), section], folder / "page.html")


def test_the_page_of_a_pivotality_run(opened):
    view = opened.locator("#tokens-and-their-effects")
    assert view.locator(".verdict").text_content() == "✕ incorrect"
    assert view.locator(".who").all_text_contents() == ["system", "user"]
    assert view.locator(".message .text").first.text_content() == "Be <b>brief</b>."
    assert view.locator(".token.pivotal").all_text_contents() == [HOSTILE[1]]
    view.locator(".token").nth(1).hover()
    assert view.locator(".card .alternatives th").all_text_contents()[-2:] == ["y", "<u>x</u>"]
    assert view.locator(".card .alternatives td").all_text_contents() == ["8 of 8", "1", "1 of 4", "0.25"]
    table = opened.locator("#pivotal-tokens table")
    assert table.locator("tbody .here").all_text_contents() == [HOSTILE[1], HOSTILE[2]]
    assert table.locator("tbody tr").first.locator("td").all_text_contents() == [
        "−0.75 [−0.94, −0.56]",
        "−0.75 [−0.94, −0.56]",
        "0.50 → 0.00",
        "1, incorrect",
    ]
    assert opened.locator("main b, main u, main i, main img").count() == 0
    assert "tiny <m> on reckon, temperature 1" in opened.locator("#pivotal-tokens dd").all_text_contents()


def test_kinds_of_credit_stand_one_under_the_other(opened):
    section = opened.locator("#kinds")
    assert section.locator(".credit-line h3").all_text_contents() == ["GRPO <b>", "exact"]
    lines = section.locator(".completion")
    assert lines.nth(0).text_content() == lines.nth(1).text_content()
    assert section.locator(".marks").all_text_contents() == ["−60+6", "−0.50+0.5"], "each on a scale of its own"
    lines.nth(1).locator(".token").first.hover()
    assert section.locator(".token.current").count() == 2, "the same token in both lines"
    names = section.locator(".card dt").all_text_contents()
    assert {"GRPO <b>", "exact", "entropy"} <= set(names)
    section.get_by_label("next completion").click()
    assert section.locator(".credit-line").count() == 1, "a kind that a completion lacks is left out of it"
    assert section.locator(".token").first.text_content() == "…", "a part of a character is seen"
    opened.set_viewport_size({"width": 400, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400


def test_kinds_that_nobody_has_are_refused():
    with pytest.raises(ValueError, match="no completion has any of the columns nothing"):
        credits_section("t", [row("a", ["x"], True)], [CreditKind("nothing", "n")])


def test_long_runs_are_thinned_and_said(tmp_path):
    path = make_run(tmp_path / "long", "grpo", 0, [], steps=())
    run = Run.open(path)
    for step in range(11, 1001):
        run.log_metrics({"step": step, "seconds": 1.0, "reward": float(step)})
    document = report.write([path], tmp_path / "page.html", {"curves": {"pass@1": {"grpo": curve(0.5)}}}).read_text()
    data = json.loads(re.findall(r'data-draw="curves.js">(.*?)</script>', document)[1])
    [line] = data["panels"][0]["series"][0]["lines"]
    assert len(line["step"]) <= 401 and line["step"][0] == 1 and line["step"][-1] == 1000
    assert "At most 400 steps of a run are drawn" in document
