"""The figures of README.md and docs/*.md are those of the committed results, digit for digit.

`docs/figures.toml` ties every figure, as a page prints it, to a result. Here the pages are read: each figure with an
interval, and each decimal in a table with a column of commands, must be tied, and what it is tied to must round to it.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TIES = tomllib.loads((ROOT / "docs" / "figures.toml").read_text(encoding="utf-8"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Results that the pages quote and that are not committed yet; a figure tied to one may name it without a key. Once the
# file is there, its name has to go from here.
NOT_COMMITTED: frozenset[str] = frozenset()

ENDS = ("value", "low", "high")
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
FIGURE = re.compile(rf"(?<![\w.]){NUMBER}(?: ?[%°])? \[{NUMBER}, {NUMBER}\]")
DECIMAL = re.compile(rf"(?<![\w.-]){NUMBER}(?![\w-])")


def plain(page: str) -> str:
    """Its text, fences of code left out, with ASCII signs, without emphasis, and a paragraph on one line."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    text = text.replace("−", "-").replace("**", "")
    return re.sub(r"(?<=[^\s|])\n *(?=[^\s|#-])", " ", text)


def numbers(text: str) -> list[str]:
    return re.findall(rf"(?<![\w.]){NUMBER}", text)


def looked_up(tie: str) -> list[float]:
    """What `NAME: KEY | KEY * FACTOR` stands for. A key is the name of a figure, or a path with " > "; a figure is its
    value, low and high.
    """
    name, _, rest = tie.partition(": ")
    keys, _, factor = rest.partition(" * ")
    result, found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), []
    for key in keys.split(" | "):
        place = result
        for step in [key] if key in result.get("figures", {}) else key.split(" > "):
            place = place.get("figures", {}).get(step, place.get(step)) if isinstance(place, dict) else place[int(step)]
        ends = place if not isinstance(place, dict) else [place[end] for end in ENDS if place.get(end) is not None]
        found += ends if isinstance(ends, list) else [ends]
    return [value * float(factor or 1) for value in found]


def agrees(printed: str, value: float) -> bool:
    """Whether the value rounds to what is printed, to its last digit."""
    digits, _, power = printed.replace(",", "").partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(printed.replace(",", "")) - value) <= 0.5000001 * step


def ties(page: str) -> list[tuple[str, str]]:
    return [
        (text, tie)
        for text, given in TIES.get(page, {}).items()
        for tie in ([given] if isinstance(given, str) else given)
    ]


def wrong(page: str) -> list[str]:
    """The ties of a page that do not hold."""
    found, text = [], plain(page)
    for printed, tie in ties(page):
        if printed not in text:
            found.append(f"{printed!r} is not on the page")
            continue
        if tie.partition(": ")[0] in NOT_COMMITTED:
            continue
        if ": " not in tie:
            found.append(f"{printed!r} names {tie} and no key of it")
            continue
        values, shown = looked_up(tie), numbers(printed)
        if len(shown) > len(values) or not all(map(agrees, shown, values)):
            found.append(f"{printed!r} is {[float(f'{value:.6g}') for value in values]} in {tie}")
    return found


def untied(page: str) -> list[str]:
    """Figures with an interval that no tie covers, and decimals of tables with commands that none covers."""
    text, printed = plain(page), {text for text, _ in ties(page)}
    found = [figure for figure in FIGURE.findall(text) if not any(figure in each for each in printed)]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        rows = table.splitlines()
        if "command" not in rows[0]:
            continue
        for row in rows[2:]:
            rest = FIGURE.sub("", row)
            for each in sorted(printed, key=len, reverse=True):
                rest = rest.replace(each, "")
            found += [number for number in DECIMAL.findall(re.sub(r"`[^`]*`", "", rest)) if "." in number]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_that_of_its_result(page):
    assert not wrong(page)


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_tied_to_a_result(page):
    assert not untied(page)


def test_nothing_is_tied_to_a_page_or_a_result_that_is_not_there():
    assert set(TIES) <= set(PAGES)
    named = {tie.partition(": ")[0] for page in TIES for _, tie in ties(page)}
    there = {path.stem for path in RESULTS.glob("*.json")}
    assert named - NOT_COMMITTED <= there
    assert not NOT_COMMITTED & there, "committed: take them off NOT_COMMITTED"


def test_a_wrong_digit_a_wrong_end_and_an_untied_figure_are_found(monkeypatch, tmp_path):
    """What the tests above must see, on a page made for it."""
    monkeypatch.setattr("test_figures.ROOT", tmp_path)
    monkeypatch.setattr("test_figures.RESULTS", tmp_path)
    rows = ["| what | figure | command |", "|---|---|---|", "| x | 0.25 [0.21, 0.30] and 7.1 | `make x` |"]
    (tmp_path / "x.md").write_text("\n".join([*rows, "", "Also **−3 %**", "[−4, 2].", ""]))
    monkeypatch.setattr("test_figures.TIES", {})
    assert untied("x.md") == ["0.25 [0.21, 0.30]", "-3 % [-4, 2]", "7.1"]
    held = {"0.25 [0.21, 0.30]": "x: a", "-3 % [-4, 2]": "x: b * 100", "7.1": "x: c > 1"}
    monkeypatch.setattr("test_figures.TIES", {"x.md": held})
    assert untied("x.md") == []
    for changed, number in ({}, 0), ({"value": 0.2551}, 1), ({"low": 0.2151}, 1), ({"high": 0.2949}, 1):
        a = {"value": 0.2549, "low": 0.2051, "high": 0.304} | changed
        figures = {"a": a, "b": {"value": -0.034, "low": -0.0449, "high": 0.0151}}
        (tmp_path / "x.json").write_text(json.dumps({"figures": figures, "c": [0, 7.149]}))
        assert len(wrong("x.md")) == number
