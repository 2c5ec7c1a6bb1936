"""What a notebook shows: inert, readable, and with the numbers that were given."""

import json
import math
import re

import pytest

import tokencredit
from test_correlation_report import study
from tokencredit.report.notebook import TokenView, visible
from tokencredit.studies.result import read_result

RECORD = {
    "prompt": [{"role": "user", "content": "2 + 3 =\n<b>"}],
    "tokens": ["<script>", " five", "", "\u202e", "\n"],
    "success": False,
    "reward": 0.25,
    "reason": "<i>wrong</i>",
    "role": None,
    "credit": [-2.0, 1.0, None, math.nan, 0.0],
    "entropy": [0.0, 0.5, 1.0, 0.25, 0.125],
    "step": 3,
}


def spans(html):
    """(number, background, text) of every token."""
    return re.findall(r'<span title="([^"]*)" style="([^"]*)">(.*?)</span>(?=<span title|</div>)', html, re.DOTALL)


def test_a_token_has_the_colour_and_the_number_of_its_score():
    html = tokencredit.TokenView.of(RECORD, "credit")._repr_html_()
    found = spans(html)
    assert [title for title, _, _ in found] == ["−2", "1", "not defined", "not defined", "0"]
    assert [style for _, style, _ in found[:2]] == [
        "background:rgba(230,129,0,0.780)",
        "background:rgba(0,114,178,0.390)",
    ]
    assert found[4][1].endswith("0.000)")
    assert "−2 to 2" in html and "✕ incorrect · reward 0.25" in html


def test_text_is_text_and_nothing_is_loaded_or_hidden():
    html = TokenView.of(RECORD)._repr_html_()
    assert html.count("<b>") == 2 and "<b>credit</b>" in html and "<b>entropy</b>" in html
    assert not re.search(r"<script|<img|<i>|\son\w+=|https?:|url\(|src=|href=|\u202e", html)
    assert "&lt;script&gt;" in html and "⟨U+202E⟩" in html and "&lt;i&gt;wrong" in html
    assert visible("") == "…", "a part of a character is seen"
    assert visible("a\r\n") == 'a⟨U+000D⟩<span style="opacity:.45">↵</span>\n'


def test_what_does_not_fit_is_refused():
    with pytest.raises(KeyError, match="no surprise; it has credit, entropy"):
        TokenView.of(RECORD, "surprise")
    with pytest.raises(ValueError, match="credit has 1 numbers for 2 tokens"):
        TokenView(["a", "b"], {"credit": [1.0]})
    long = TokenView(["a"] * 5000, {"credit": [0.0] * 5000})._repr_html_()
    assert len(spans(long)) == 4000 and "1000 further tokens are not shown" in long


def test_a_study_s_result_shows_findings_and_figures(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"study": "correlation", **study()}))
    result = read_result(tmp_path)
    html = result._repr_html_()
    assert "<li>&lt;u&gt;found&lt;/u&gt;</li>" in html and "tokencredit &lt;x&gt;" in html
    assert f"{len(result['figures'])} figures" in html and "<b>norm" not in html
    assert isinstance(result, dict) and json.dumps(result["command"])
