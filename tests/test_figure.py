"""A figure: what a reader sees of it, what a file holds of it, and both again."""

import json
import math

import pytest

from tokencredit.durable import plain
from tokencredit.figure import Figure, number
from tokencredit.report.figures import point, shown, table
from tokencredit.stats import Estimate


@pytest.mark.parametrize(
    "value, form, text",
    [
        (0.12345, "", "0.123"),
        (-12.345, "", "−12.3"),
        (12345.6, "", "12,346"),
        (1e-5, ".1e", "1.0e−05"),
        (-0.5, "+.2f", "−0.50"),
        (None, "", "–"),
        (math.nan, ".3g", "–"),
        (math.inf, ".3g", "∞"),
        (-math.inf, "", "−∞"),
    ],
)
def test_numbers_as_a_reader_sees_them(value, form, text):
    assert number(value, form) == text


def test_text_and_html_say_the_same():
    figure = Figure(0.25, -0.125, 0.5, "nats")
    assert figure.text(".3f") == "0.250 [−0.125, 0.500]"
    assert shown(figure, ".3f") == '0.250 <span class="ends">[−0.125, 0.500]</span>'
    assert figure.text(".0f", 1000) == "250 [−125, 500]" and figure.text(sign=True).startswith("+0.250")
    assert point(figure, 2) == {"value": 0.5, "low": -0.25, "high": 1.0}


def test_an_interval_is_shown_where_there_is_one():
    assert Figure(2.0).text(".0f") == "2", "none was taken"
    assert Figure(2.0, -math.inf, math.inf).text(".0f") == "2", "the data give no end"
    assert Figure(2.0, 1.0, math.inf).text(".0f") == "2 [1, ∞]"
    assert Figure(2.0, 2.0, 2.0, num=0).text(".0f") == "2", "known exactly"
    assert Figure(2.0, 2.0, 2.0, num=9).text(".0f") == "2 [2, 2]", "all nine units agree"
    assert Figure(math.nan, 1.0, 2.0).text() == "–"
    assert shown(None) == "–" and shown(Figure(math.nan, more={"note": "<b>"})) == '<span class="unit">&lt;b&gt;</span>'


def test_its_sign_is_that_of_an_interval_without_0():
    signs = [Figure(1.0, *ends).sign for ends in ((0.5, 2.0), (-2.0, -0.5), (-1.0, 1.0), (math.nan, math.nan))]
    assert signs == [1, -1, 0, 0]


@pytest.mark.parametrize(
    "figure",
    [
        Figure(0.5, 0.25, 0.75, "nats", 8, 3, "tokencredit x", "a label", {"p": 0.5, "holm": 1.0}),
        Figure(math.inf, 2.0, math.inf, "prompts", 8, [0, 1], "tokencredit x"),
        Figure(1.0, -math.inf, math.inf),
    ],
)
def test_a_file_holds_all_of_it(figure):
    """Through strict JSON, which has no infinite number, and back."""
    stored = json.loads(json.dumps(plain(figure.as_json()), allow_nan=False))
    assert Figure.from_json(stored) == figure
    assert {"value", "low", "high", "num"} <= stored.keys()


def test_what_is_not_defined_is_null_and_nan_again():
    stored = plain(Figure(math.nan, unit="nats").as_json())
    assert stored == {"value": None, "low": None, "high": None, "num": 0, "unit": "nats"}
    assert math.isnan(Figure.from_json(stored).value)


def test_figures_of_earlier_versions_are_read():
    """Without a seed or a command, with the level that an estimate had; infinities were null."""
    old = {"value": 1.0, "low": 0.5, "high": None, "num": 4, "level": 0.95, "label": "noise scale", "unit": "prompts"}
    figure = Figure.from_json(old)
    assert (figure.value, figure.low, figure.num, figure.label) == (1.0, 0.5, 4, "noise scale")
    assert figure.seed is None and figure.command == "" and figure.text(".1f") == "1.0 [0.5, –]"


def test_an_estimate_with_a_unit_is_a_figure():
    figure = Figure.of(Estimate(0.5, 0.25, 0.75, 8), "nats", seed=1, command="c")
    assert figure == Figure(0.5, 0.25, 0.75, "nats", 8, 1, "c")


def test_a_table_escapes_its_heads_and_not_its_cells():
    html = table("<t>", ("<a>", ("b", '"why"')), [["<i>name</i>", "<b>1</b>"]])
    assert "<th>&lt;a&gt;</th>" in html and 'title="&quot;why&quot;"' in html and "<td><b>1</b></td>" in html
    assert '<th scope="row"><i>name</i></th>' in html and 'aria-label="&lt;t&gt;"' in html
