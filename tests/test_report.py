"""The report in a real browser: it loads nothing, model output stays text, and the numbers shown are the numbers
recorded.
"""

import json
import math
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from tokencredit import report
from tokencredit.figure import number
from tokencredit.report.page import embedded_json
from tokencredit.report.section import Material, Section, compact
from tokencredit.report.tokens import MAX_BYTES, chosen, spread
from tokencredit.runs import Run

HOSTILE = [
    "<script>",
    "alert(1)",
    "</script>",
    "<img src=x onerror=",
    "alert(2)",
    ">",
    " ]]>",
    "<!--",
    "\u202e",
    "\u2028",
    "&lt;",
    "\n",
]
PROMPT = "2 + 3 =\n<b>bold</b> &amp; </script>"


def row(prompt, tokens, success, scale=1.0, **changes):
    """Token t of n: log-prob -(t+1)/4, entropy (t+1)/8, credit alternating in sign and growing."""
    count = range(len(tokens))
    scores = {
        "logprob": [-(at + 1) / 4 for at in count],
        "entropy": [(at + 1) / 8 for at in count],
        "credit": [scale * (-1) ** at * (at + 1) / 2 for at in count],
    }
    return {
        "group": 0,
        "prompt": prompt,
        "completion": "".join(tokens),
        "reward": float(success),
        "success": success,
        "reason": "<i>r</i>",
        "token_ids": list(count),
        "tokens": tokens,
        "role": ["words" if at % 2 else "answer" for at in count],
        **scores,
        **changes,
    }


def make_run(path, method, seed, rows, steps=(5, 10), status="finished"):
    run = Run.create(
        path,
        name=f"{method}-{seed}",
        method=f"Method({method!r})",
        method_name=method,
        task="reckon",
        model="tiny",
        config={"steps": 10, "learning_rate": 1e-4 * (seed + 1)},
        seed=seed,
        command=f"tokencredit train {method} <x>",
    )
    for step in (0, 5, 10):
        roles = {"words": 0.5 - step / 50, "answer": {"value": 0.25, "low": 0.2, "high": 0.3}}
        run.log_evaluation({"step": step, "seconds": step * 2.0, "split": "test", "entropy_by_role": roles})
    for step in range(1, 11):
        figures = {"reward": 0.5, "pass_rate": 0.5, "clip_low": 0.0, "grad_norm": 1 - step / 16}
        run.log_metrics({"step": step, "seconds": step * 12.0, **figures})
    for step in steps:
        run.write_tokens(step, rows)
    if status == "finished":
        run.finish()
    return path


def curve(start):
    value = [start, start + 0.125, start + 0.25]
    return {
        "step": [0, 5, 10],
        "value": value,
        "low": [each - 0.0625 for each in value],
        "high": [each + 0.0625 for each in value],
        "seeds": {"0": value, "1": [each + 0.01 for each in value]},
    }


CURVES = {
    "methods": [
        {
            "name": "grpo",
            "label": "GRPO",
            "source": "arXiv:2402.03300",
            "needs": [],
            "fidelity": "paper",
            "seeds": [0, 1],
            "summary": {"pass@1": {"value": 0.5, "low": 0.4375, "high": 0.5625}},
        },
        {
            "name": "gtpo",
            "label": "GTPO <b>",
            "source": "arXiv:2508.04349",
            "needs": ["entropy"],
            "fidelity": "paper",
            "seeds": [0],
            "summary": {"pass@1": {"value": 0.75, "low": 0.6875, "high": 0.8125}},
        },
    ],
    "curves": {
        "pass@1": {"gtpo": curve(0.5), "grpo": curve(0.25)},
        "entropy": {"gtpo": curve(1.0), "grpo": curve(0.5)},
        "length": {"grpo": {"step": [0, 10], "value": [10.0, math.nan], "low": None, "high": None}},
    },
    "findings": [
        {"claim": "another", "verdict": "not resolved", "detail": ""},
        {"claim": "<u>GTPO</u> keeps entropy", "verdict": "shows here", "detail": "0.2"},
        {"claim": "a third", "verdict": "not resolved", "detail": ""},
    ],
}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    rows = [
        row(PROMPT, HOSTILE, True),
        row(PROMPT, ["four", " ", "\t", "!"], False, gradient_norm=[1.0, math.nan, 3.0, 4.0]),
        row("only here", ["x"], True),
    ]
    dirs = [
        make_run(root / "grpo-0", "grpo", 0, rows),
        make_run(root / "grpo-1", "grpo", 1, rows, steps=(10,), status="running"),
        make_run(root / "gtpo-0", "gtpo", 0, [row(PROMPT, ["2", "3"], False, scale=8.0)]),
    ]
    return report.write(dirs, root / "report.html", CURVES, title="A <title>")


def choose(page, label, value):
    page.get_by_label(label, exact=True).select_option(label=value)


def card(page):
    rows = page.locator(".card dl > div")
    return dict(zip(rows.locator("dt").all_text_contents(), rows.locator("dd").all_text_contents()))


def test_every_section_is_there_and_the_text_is_text(opened):
    titles = ["Tokens", "What was run", "Findings", "Methods", "Learning curves", "Training curves", "Entropy by role"]
    assert opened.locator("main h2").all_text_contents() == titles
    assert opened.title() == opened.locator("h1").text_content() == "A <title>"
    assert opened.locator(".claim").first.text_content() == "<u>GTPO</u> keeps entropy"
    assert opened.locator("#findings .verdict.yes").first.text_content() == "✓ shows here"
    assert "1 of 3 runs did not finish: grpo-1 (running)." in opened.locator(".notice").text_content()
    methods = opened.locator(".methods tbody tr")
    assert methods.locator("th").all_text_contents() == ["GRPO", "GTPO <b>"]
    assert "0.750 [0.688, 0.812]" in methods.last.locator(".figure").text_content()
    assert opened.locator("main b, main u, main i, main img").count() == 0
    assert "tokencredit train grpo <x>" in opened.locator("#what-was-run td code").all_text_contents()


def test_what_is_not_resolved_is_folded_under_what_is(opened):
    section = opened.locator("#findings")
    assert section.locator("> .findings .claim").all_text_contents() == ["<u>GTPO</u> keeps entropy"]
    assert section.locator("summary").text_content() == "2 further claims are not resolved by these runs"
    assert section.locator("details .claim").all_text_contents() == ["another", "a third"]


def test_steps_are_drawn_as_they_were_recorded(opened):
    """One line per run, also of a figure that no evaluation has; what is zero throughout is said and not drawn."""
    section = opened.locator("#training-curves")
    assert section.locator("figcaption strong").all_text_contents() == ["reward", "gradient norm"]
    assert "Zero at every step: clipped below." in section.locator(".note").text_content()
    assert section.locator("figure").first.locator(".seed.only").count() == 3, "three runs"
    section.locator("summary").nth(1).click()
    section.locator("details tbody").nth(0).wait_for()
    row = section.locator("details tbody tr").nth(3)
    assert row.locator("th, td").all_text_contents() == ["4", "0.75", "0.75", "0.75"]


def test_hostile_completions_are_inert_and_visible(opened):
    shown = opened.locator(".completion").first
    text = shown.text_content()
    assert text.startswith("<script>alert(1)</script><img src=x onerror=alert(2)> ]]><!--U+202EU+2028&lt;"), text
    assert "\u202e" not in text, "a mark that reverses the text is written, not obeyed"
    assert shown.locator("script, img").count() == 0
    assert opened.locator(".prompt .text").text_content() == PROMPT
    assert opened.locator(".judged").first.text_content().startswith("✓ correctreward 1<i>r</i>12 tokens")


def test_pointing_at_a_token_shows_its_numbers(opened):
    token = opened.locator(".completion .token").nth(3)
    token.hover()
    assert opened.locator(".card .token-text").text_content() == "<img src=x onerror="
    assert card(opened) == {
        "credit": "−2",
        "entropy": "0.5 nats",
        "probability": "0.368",
        "log-probability": "−1 nats",
        "role": "words",
        "position": "4 of 12",
    }
    assert "negative" in token.get_attribute("class")
    opened.locator("#tokens h2").hover()
    assert not opened.locator(".card").is_visible()


def test_the_keyboard_reaches_every_token(opened):
    opened.locator(".completion .token").first.focus()
    opened.keyboard.press("ArrowRight")
    assert card(opened)["position"] == "2 of 12"
    opened.keyboard.press("End")
    assert card(opened)["position"] == "12 of 12"
    opened.keyboard.press("Escape")
    assert not opened.locator(".card").is_visible()


def test_pointing_at_the_strip_marks_the_token(opened):
    opened.locator(".strip").scroll_into_view_if_needed()
    box = opened.locator(".strip").bounding_box()
    opened.mouse.move(box["x"] + box["width"] - 12, box["y"] + 40)
    assert card(opened)["position"] == "12 of 12"
    assert opened.locator(".token.current").get_attribute("data-at") == "11"


def test_score_run_step_and_filter_switch(opened):
    background = "element => getComputedStyle(element).backgroundColor"
    last = opened.locator(".completion .token").last
    before = last.evaluate(background)
    choose(opened, "Colour by", "entropy")
    assert "sequential" in last.get_attribute("class") and last.evaluate(background) != before
    assert opened.locator(".shades .marks").text_content() == "01.5"
    choose(opened, "Colour by", "role")
    assert "r0" in opened.locator(".completion .token").first.get_attribute("class")
    choose(opened, "Run", "GRPO, seed 1")
    assert opened.get_by_label("Step", exact=True).locator("option").all_text_contents() == ["10"]
    choose(opened, "Run", "GRPO, seed 0")
    choose(opened, "Step", "5")
    assert opened.locator(".pane h3").text_content() == "GRPO, seed 0, step 5"
    choose(opened, "Completions", "incorrect")
    assert opened.locator(".completion").text_content() == "four \t!"
    assert opened.locator(".count").text_content() == "1 of 1"
    choose(opened, "Colour by", "gradient_norm")
    assert "undefined" in opened.locator(".completion .token").nth(1).get_attribute("class")


def test_two_runs_are_compared_on_one_prompt(opened):
    choose(opened, "Run", "GRPO, seed 0")
    choose(opened, "Compare with", "GTPO <b>, seed 0")
    assert opened.locator(".pane h3").all_text_contents() == ["GRPO, seed 0, step 10", "GTPO <b>, seed 0, step 10"]
    assert opened.locator(".completion").nth(1).text_content() == "23"
    # Both panes share one axis: the largest credit is 8 * 2 / 2 = 8 in the second and 12 / 2 = 6 in the first.
    assert all("+8" in strip for strip in opened.locator(".strip").all_text_contents())
    opened.get_by_label("completion 3, correct").click()
    assert "Nothing embedded here answers this prompt" in opened.locator(".pane").nth(1).text_content()
    choose(opened, "Compare with", "GRPO, seed 1")
    assert opened.locator(".completion").all_text_contents() == ["x", "x"]


def test_going_through_completions_keeps_the_focus(opened):
    choose(opened, "Run", "GRPO, seed 0")
    assert opened.locator(".count").text_content() == "1 of 3"
    opened.get_by_label("next completion").focus()
    opened.keyboard.press("Enter")
    opened.keyboard.press("Enter")
    assert opened.locator(".count").text_content() == "3 of 3"
    assert opened.locator(".prompt .text").text_content() == "only here"
    opened.get_by_label("next completion").click()
    assert opened.locator(".count").text_content() == "1 of 3"


def test_curves_show_their_values_and_can_be_hidden(opened):
    figure = opened.locator("#learning-curves figure").first
    assert figure.locator(".label").all_text_contents() == ["GTPO <b>", "GRPO"], "from top to bottom, as the lines end"
    frame = figure.locator("svg").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    opened.mouse.move(box["x"] + 45, box["y"] + 60)
    rows = figure.locator(".readout tr").all_text_contents()
    assert rows == ["GRPO0.25 [0.188, 0.313]", "GTPO <b>0.5 [0.438, 0.563]"], rows
    frame.focus()
    opened.keyboard.press("ArrowRight")
    assert figure.locator(".readout strong").text_content() == "step 5"
    figure.locator("summary").click()
    assert figure.locator("details tbody tr").last.locator("td").last.text_content() == "0.75 [0.688, 0.813]"
    opened.locator("#learning-curves .key").first.click()
    opened.set_viewport_size({"width": 700, "height": 900})
    while (
        float(frame.get_attribute("width")) < 600
    ):  # one column now; the page's policy forbids the browser's own waiting, which is eval
        opened.wait_for_timeout(20)
    assert figure.locator("g.curve.hidden").count() == 2, "hidden lines stay hidden when the plot is drawn anew"
    assert figure.locator("g.curve:not(.hidden)").count() == 2


def test_entropy_by_role_is_drawn_as_recorded(opened):
    figures = opened.locator("#entropy-by-role figure")
    assert figures.locator("figcaption strong").all_text_contents() == ["words", "answer"]
    figures.nth(1).locator("summary").click()
    figures.nth(1).locator("details tbody").wait_for()
    assert figures.nth(1).locator("details thead th").all_text_contents() == [
        "step",
        "GRPO, seed 0",
        "GRPO, seed 1",
        "GTPO <b>, seed 0",
    ]
    assert figures.nth(1).locator("details tbody td").all_text_contents() == ["0.25"] * 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_stays_readable(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": 400, "height": 800})
    opened.locator(".completion .token").first.hover()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    colours = opened.evaluate("""() => {
      const style = getComputedStyle(document.body);
      return [style.color, style.backgroundColor].map((colour) => colour.match(/\\d+/g).map(Number));
    }""")
    assert contrast(*colours) > 10


def contrast(one, other):
    """The contrast ratio of two sRGB colours (WCAG 2.2)."""

    def luminance(colour):
        linear = [each / 255 / 12.92 if each <= 10 else ((each / 255 + 0.055) / 1.055) ** 2.4 for each in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_policy_stops_a_script_that_a_builder_forgot_to_escape(browser, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        leak = Section(
            "Leak",
            f"<script>window.leaked = 1</script><img src='{address}'><img src='data:,' onerror='window.leaked = 2'>"
            f"<p style='color: red' onclick='window.leaked = 3'>press</p><link rel='stylesheet' href='{address}'>",
        )
        page = browser.new_page()
        page.goto(report.write([], tmp_path / "leak.html", {}, extra=[leak]).as_uri())
        page.locator("#leak p").click()
        assert page.evaluate("window.leaked") is None
        assert page.evaluate("getComputedStyle(document.querySelector('#leak p')).color") != "rgb(255, 0, 0)"
        page.evaluate("fetch(arguments[0]).catch(() => {})".replace("arguments[0]", json.dumps(address)))
        page.close()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_file_refers_to_nothing_outside(page_path):
    document = page_path.read_text()
    assert re.findall(r"""(?:src|href|action|data)=["']?(?!#)[^"'\s>]*:""", document) == []
    assert (
        re.findall(
            r"url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(",
            document,
        )
        == []
    )
    assert set(re.findall(r"https?://[^\s\"'<]+", document)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "default-src 'none'; script-src 'sha256-" in document and "unsafe" not in document


def test_embedded_json_cannot_end_its_element():
    value = {"text": "</script><!-- ]]> & \u2028\u2029", "number": 0.5}
    embedded = embedded_json(value)
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == value


def test_sections_without_material_are_left_out(tmp_path):
    empty = report.write([], tmp_path / "empty.html", {}).read_text()
    assert re.findall(r"<h2", empty) == []
    run = make_run(tmp_path / "run", "grpo", 0, [], steps=())
    document = report.write([run], tmp_path / "one.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]*)", document) == [
        "What was run",
        "Methods",
        "Training curves",
        "Entropy by role",
    ]


def test_a_killed_run_without_records_is_reported(tmp_path):
    run = make_run(tmp_path / "run", "grpo", 0, [], steps=(), status="running")
    (run / "metrics.jsonl").write_text('{"step": 1, "sec')
    (run / "evaluations.jsonl").unlink()
    assert "1 of 1 runs did not finish" in report.write([run], tmp_path / "out.html").read_text()


def test_a_large_study_is_cut_to_size_and_says_so(tmp_path):
    rows = [row(f"prompt {at % 15}", ["word "] * 900, at % 3 == 0) for at in range(30)]
    dirs = [make_run(tmp_path / f"r{seed}", "grpo", seed, rows, steps=(1, 2, 3, 4)) for seed in range(2)]
    path = report.write(dirs, tmp_path / "large.html")
    assert MAX_BYTES / 3 < path.stat().st_size < 5_000_000
    said = re.search(r"This page embeds ([^<]*)", path.read_text()).group(1)
    assert re.match(r"6 of 8 recorded steps \(over all runs\); \d+ of \d+ completions of these steps", said), said


def test_completions_of_shared_and_mixed_prompts_come_first():
    from collections import Counter

    rows = [
        {"prompt": prompt, "success": success, "id": at}
        for at, (prompt, success) in enumerate(
            [("a", True), ("a", True), ("b", True), ("b", True), ("b", False), ("c", False)]
        )
    ]
    picked = chosen(rows, Counter({"c": 3, "a": 1, "b": 1}), 4)
    assert [each["id"] for each in picked] == [5, 2, 4, 3], (
        "the shared prompt, then the mixed one with its outcomes in turn"
    )
    assert [each["id"] for each in chosen(rows, Counter(), 2)] == [2, 4]


def test_small_numbers_of_the_page():
    assert [spread(list(range(10)), limit) for limit in (1, 2, 3, 20)] == [[9], [0, 9], [0, 4, 9], list(range(10))]
    assert number(-0.12345) == "−0.123" and number(None) == number(math.nan) == "–" and number(12.34, ".2g") == "12"
    assert compact({"a": [0.123456, math.inf, 3, None]}) == {"a": [0.1235, None, 3, None]}


def test_a_method_has_one_colour_everywhere():
    material = Material([], {"methods": [{"name": "b"}, {"name": "a"}]})
    assert [material.colour(name) for name in ("b", "a", "unknown")] == [0, 1, 2]


def test_a_failed_write_leaves_the_previous_report(page_path, tmp_path, monkeypatch):
    out = Path(shutil.copy(page_path, tmp_path / "report.html"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"report\.html"):
        report.write([], out)
    assert out.read_bytes() == page_path.read_bytes()
