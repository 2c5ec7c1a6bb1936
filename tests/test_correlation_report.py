"""The correlation study's page in a real browser: it loads nothing, model output stays text, its numbers are the
study's.
"""

import json

import pytest

from tokencredit.studies.correlation.question import STUDY

HOSTILE = ["<script>", "alert(1)", "</script>", "<img src=x onerror=alert(2)>"]
PROXIES = ("entropy", "<b>norm</b>")
MEASURES = ("spearman", "corrected_ranks", "captured", "auroc")


def study():
    """A result as the study writes it: two proxies, four tokens, three conditions."""
    figures = {}

    def enter(name, value, half=0.125):
        figures[name] = {
            "value": value,
            "low": value - half,
            "high": value + half,
            "p": 0.5,
            "unit": "correlation",
            "seed": 0,
        }
        return name

    def block(source, estimand, start):
        measures = {
            m: {p: enter(f"{source}/{estimand}/{m}/{p}", start + place / 4) for place, p in enumerate(PROXIES)}
            for m in MEASURES
        }
        return {"measures": measures, "comparisons": {}}

    blocks = {"sampled": {}, "exact": {}}
    for estimand in ("replace", "before_after", "spread"):
        point = {"value": 0.25, "low": 0.125, "high": 0.375}
        blocks["exact"][estimand] = block("exact", estimand, 0.5)
        blocks["sampled"][estimand] = block("sampled", estimand, 0.25) | {
            "noise_only": {p: enter(f"{estimand}/noise/{p}", 0.125) for p in PROXIES},
            "limit": {p: enter(f"{estimand}/limit/{p}", 0.5) for p in PROXIES},
            "curve": {
                "rollouts": [4, 8],
                "points": {p: [point, point] for p in PROXIES},
                "constant": dict.fromkeys(PROXIES, 3.0),
            },
            "ceiling": None,
            "reliability": {"signed": enter(f"{estimand}/reliability", 0.75)},
            "resolved": estimand != "replace",
            "verdict": "unresolved at this budget",
        }
    names = (
        "success",
        "ece",
        "overconfidence",
        "entropy",
        "spearman",
        "spearman_within",
        "captured",
        "captured_spread",
    )
    rows = [
        {
            "label": f"<i>T</i> {at}",
            "kind": "temperature",
            "prompts": 8,
            "tokens": 90,
            "curve": [],
            "expected_ece": 0.0625,
            "figures": {name: enter(f"condition/{at}/{name}", at / 4) for name in names},
        }
        for at in range(3)
    ]
    tests = {
        "all conditions": {"conditions": 3, "captured": enter("h/captured", -0.5), "spearman": enter("h/spearman", 0.5)}
    }
    effect = {
        "value": [0.5, -0.25, None, 0.0],
        "low": [0.25, -0.5, None, -0.1],
        "high": [0.75, 0.0, None, 0.1],
        "certainty": [1.0, 0.5, 0.0, 0.1],
    }
    other = {"text": "<u>x</u>", "share": 0.5, "num": 4, "correct": 1}
    view = [
        {
            "prompt": "2 + 2 <b>",
            "correct": right,
            "reason": "<i>r</i>",
            "tokens": HOSTILE,
            "role": None,
            "value": [0.5, 1, 0.75, 0.75, 0.75],
            "low": [0.4, 0.9, 0.6, 0.6, 0.6],
            "high": [0.6, 1, 0.9, 0.9, 0.9],
            "pi": [0.5] * 4,
            "alternatives": [[other], [], [], []],
            "proxies": {"entropy": [0.5] * 4},
            "before_after": effect | {"exact": [0.625, -0.2, None, 0.0]},
            "replace": effect,
        }
        for right in (True, False)
    ]
    ranks = {p: [0.1, 0.4, 0.6, 0.9] for p in PROXIES}
    effects = {name: [0.0, 0.1, -0.2, 0.3] for name in ("replace", "before_after", "spread")}
    group = {
        "tokens": 3,
        "prompts": 2,
        "spearman": {"entropy": enter("split", -0.25)},
        "captured": {"entropy": enter("split c", 0.5)},
    }
    splits = {"before_after": {"role <b>": group, "rare": {"tokens": 1, "prompts": 1}}}
    return {
        "figures": figures,
        **blocks,
        "splits": splits,
        "conditions": {"rows": rows, "hypothesis": tests},
        "view": view,
        "law": {},
        "scatter": {"ranks": ranks, "effects": effects, "roles": [], "role": None, "source": "exact"},
        "command": "tokencredit <x>",
        "findings": ["<u>found</u>"],
        "num": {"tokens": 4, "completions": 2, "correct": 1, "prompts": 1},
        "config": {"model": "m", "task": "t", "temperature": 1.0, "rollouts": 8, "seed": 0, "threshold": 0.2},
        "cost": {"rollouts": 32, "tokens": 99, "seconds": {"a": 1.0}},
    }


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "result.json").write_text(json.dumps(study()))
    return STUDY.write_page(folder)


def choose(section, label, value):
    section.get_by_label(label, exact=True).select_option(value)


def test_sections_figures_and_text_are_those_of_the_study(opened):
    assert opened.locator("main h2").all_text_contents() == [
        "Tokens and their effects",
        "Which proxy knows what matters",
        "Proxies against effects",
        "Correlations",
        "Where it holds",
        "Tokens one by one",
        "What more rollouts would do",
        "When is entropy a good proxy?",
    ]
    table = opened.locator("#proxies-against-effects table").first
    assert table.locator("tbody th").all_text_contents() == ["<b>norm</b>", "entropy"], (
        "by captured share, largest first"
    )
    assert table.locator("tbody tr").last.locator("td").first.text_content() == "0.50 [0.38, 0.62]"
    assert "<u>found</u>" in opened.locator("main ul").first.text_content()
    assert opened.locator("main b, main u, main i, main img").count() == 0
    assert opened.locator("#proxies-against-effects .notice").all_text_contents() == [
        "From rollouts: unresolved at this budget; nothing was corrected."
    ]
    rows = opened.locator("#when-is-entropy-a-good-proxy- tbody tr")
    assert rows.count() == 3 and rows.nth(1).locator("td").nth(2).text_content() == "0.25 [0.12, 0.38]"


def test_the_forest_plot_switches_effect_and_measure(opened):
    section = opened.locator("#correlations")
    assert section.locator("g.mark").count() == 4, "two proxies, exact and from rollouts"
    assert "<b>norm</b>, exact: 0.75 [0.625, 0.875]" in section.locator("g.mark title").all_text_contents()
    choose(section, "Measure", "spearman")
    assert section.locator("g.mark").count() == 6, "and noise alone"
    choose(section, "Effect", "spread")
    section.locator("summary").click()
    assert section.locator("details tbody tr").first.locator("td").first.text_content() == "0.75 [0.625, 0.875]"


def test_groups_of_tokens_are_listed_with_what_is_known_of_them(opened):
    section = opened.locator("#where-it-holds")
    section.locator("summary").first.click()
    rows = section.locator("details").first.locator("tbody tr")
    assert rows.locator("th").all_text_contents() == ["role <b>", "rare"]
    assert rows.first.locator("td").all_text_contents() == ["3", "2", "−0.25 [−0.38, −0.12]", "0.50 [0.38, 0.62]"]
    assert rows.last.locator("td").all_text_contents() == ["1", "1", "–", "–"]


def test_scatter_budget_and_conditions_are_drawn(opened):
    scatter = opened.locator("#tokens-one-by-one")
    assert scatter.locator("circle.point").count() == 4
    scatter.locator("circle.point").nth(1).hover()
    assert scatter.locator("[role=status]").text_content() == "before_after 0.1, rank 0.4"
    budget = opened.locator("#what-more-rollouts-would-do")
    assert budget.locator("[role=status]").text_content() == "Limit 0.5, exact 0.5; 4 rollouts 0.25, 8 rollouts 0.25."
    conditions = opened.locator("#when-is-entropy-a-good-proxy-")
    assert conditions.locator("g.mark").count() == 3
    assert "<i>T</i> 1" in conditions.locator("g.mark text").all_text_contents()


def test_the_token_view_shows_effects_intervals_and_alternatives(opened):
    section = opened.locator("#tokens-and-their-effects")
    tokens = section.locator(".completion .token")
    assert tokens.all_text_contents() == HOSTILE
    kinds = [set(tokens.nth(at).get_attribute("class").split()) - {"token"} for at in range(3)]
    assert kinds == [{"positive", "pivotal"}, {"negative"}, {"undefined"}]
    assert tokens.nth(0).evaluate("e => e.style.getPropertyValue('--strength')") == "1.000"
    assert tokens.nth(1).evaluate("e => e.style.getPropertyValue('--strength')") == "0.250", (
        "half the size, half as certain"
    )
    tokens.nth(0).hover()
    card = section.locator(".card")
    facts = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents()))
    assert (
        facts["before_after"] == "0.5 [0.25, 0.75]"
        and facts["exact"] == "0.625"
        and facts["V before → after"] == "0.5 → 1"
    )
    assert card.locator("tbody th").text_content() == "<u>x</u>"
    assert card.locator("tbody td").all_text_contents() == ["1 of 4", "0.25", "0.5"]
    assert section.locator(".curve .band").count() == 1 and section.locator(".curve .line").count() == 1
    tokens.nth(0).focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert card.locator("dd").first.text_content() == "undefined: no alternative"
    opened.keyboard.press("Escape")
    assert not card.is_visible()
    section.get_by_label("next completion").click()
    assert section.locator(".verdict").text_content() == "✕ incorrect"


def test_it_fits_a_narrow_screen(opened):
    opened.set_viewport_size({"width": 400, "height": 800})
    opened.locator("#tokens-and-their-effects .token").first.hover()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
