"""What the study concludes: each claim with its verdict, said in a word and a sign and not by colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.report.section import Material, Section, text

SIGNS = {"shows here": ("yes", "✓"), "does not show here": ("no", "✕"), "not resolved": ("open", "?")}
RESOLVED = ("shows here", "does not show here")


def resolved_first(findings: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(what is resolved, what is not), each in its order."""
    resolved = [each for each in findings if each["verdict"] in RESOLVED]
    return resolved, [each for each in findings if each["verdict"] not in RESOLVED]


def _item(finding: Mapping[str, Any]) -> str:
    kind, sign = SIGNS.get(finding["verdict"], ("open", "?"))
    verdict = f'<span class="verdict {kind}"><span aria-hidden="true">{sign}</span> {text(finding["verdict"])}</span>'
    return f'<li>{verdict}<p class="claim">{text(finding["claim"])}</p><p>{text(finding.get("detail", ""))}</p></li>'


def _list(findings: Sequence[Mapping[str, Any]]) -> str:
    return f'<ul class="findings">{"".join(map(_item, findings))}</ul>'


def build(material: Material) -> Section | None:
    """The findings in the study's words: those that it resolves, and the others together, folded where there are
    both.
    """
    resolved, rest = resolved_first(material.curves.get("findings", []))
    if not resolved or not rest:
        return Section("Findings", _list(resolved or rest)) if resolved or rest else None
    claims = "claim is" if len(rest) == 1 else "claims are"
    folded = (
        f"<details><summary>{len(rest)} further {claims} not resolved by these runs</summary>{_list(rest)}</details>"
    )
    return Section("Findings", _list(resolved) + folded)
