"""The report's scripts without a browser: what a script uses is on the page, which closes over its first line."""

import re
from importlib import import_module, resources
from pathlib import Path

import pytest

import tokencredit
from tokencredit.report.section import Section

page = import_module("tokencredit.report.page")  # the package has its function under that name
FOLDER = resources.files("tokencredit.report")
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.name.endswith(".js")}
EVERYWHERE = ("dom.js", "start.js")


def declared(source):
    """Names that a script gives to all others: functions and constants at the beginning of a line."""
    return set(re.findall(r"^(?:const|let|function) +([A-Za-z_]\w*)", source, re.MULTILINE))


def needed(name, sources=SOURCES):
    """{name: script} of the functions that a script calls and of the constants in capitals that it reads, which another
    script declares and no variable or argument of its own hides.
    """
    code = re.sub(r"//[^\n]*", "", sources[name])
    found = {}
    for other, source in sources.items():
        for each in declared(source) if other != name else ():
            used = re.search(rf"(?<![\w.$]){each}(?:\(|\b)" if each.isupper() else rf"(?<![\w.$]){each}\(", code)
            own = re.search(
                rf"\b(?:const|let) (?:[^;=]*[\s,{{\[])?{each}\b[^;]*="  # a variable
                rf"|\([^()]*\b{each}\b[^()]*\) (?:=>|{{)",  # an argument
                code,
            )
            if used and not own:
                found[each] = other
    return found


def lacking(name, sources=SOURCES):
    """What a page that draws with this script would lack, {name: script}."""
    there = {part: needed(part, sources) for part in page.scripts([name])}
    return {
        each: other for found in there.values() for each, other in found.items() if other not in page.scripts([name])
    }


@pytest.mark.parametrize("name", sorted(set(SOURCES) - set(EVERYWHERE)))
def test_a_page_has_all_that_its_scripts_use(name):
    assert lacking(name) == {}
    assert set(page.uses(name)) <= set(needed(name).values()), "and names nothing that it does not use"


def test_a_part_that_is_missing_is_found(monkeypatch):
    """The token view without the line plot, as it once was: its strip draws ticks, which are the plot's."""
    whole = page.uses
    monkeypatch.setattr(page, "uses", lambda name: tuple(part for part in whole(name) if part != "plot.js"))
    assert lacking("tokens.js") == {"ticks": "plot.js"} and lacking("strip.js") == {"ticks": "plot.js"}


def test_parts_come_before_what_uses_them_and_once():
    names = page.scripts(["tokens.js", "variance_plane.js"])
    assert names[0] == "dom.js" and names[-1] == "start.js" and len(names) == len(set(names))
    for at, name in enumerate(names):
        assert set(page.uses(name)) <= set(names[:at]), name
    document = page.page("t", [Section("A", "", {}, "tokens.js")])
    assert document.index("function ticks") < document.index("function drawStrip") < document.index('draw("tokens.js"')


def test_every_script_is_drawn_by_a_section_or_is_a_part():
    package = Path(tokencredit.__file__).parent
    drawn = set()
    for source in [*package.glob("report/*.py"), *package.glob("studies/*/page.py")]:
        drawn |= set(re.findall(r'"(\w+\.js)"', source.read_text()))
    parts = {part for name in SOURCES for part in page.uses(name)}
    assert set(SOURCES) == drawn | parts | set(EVERYWHERE)
