"""What the study concludes: each claim with its verdict, said in a word and a sign and not by colour alone."""

from __future__ import annotations

from tokencredit.report.section import Material, Section, text

SIGNS = {"shows here": ("yes", "✓"), "does not show here": ("no", "✕"), "not resolved": ("open", "?")}


def build(material: Material) -> Section | None:
    """The findings, in the study's order and words."""
    items = []
    for finding in material.curves.get("findings", []):
        kind, sign = SIGNS.get(finding["verdict"], ("open", "?"))
        verdict = (
            f'<span class="verdict {kind}"><span aria-hidden="true">{sign}</span> {text(finding["verdict"])}</span>'
        )
        items.append(
            f'<li>{verdict}<p class="claim">{text(finding["claim"])}</p><p>{text(finding.get("detail", ""))}</p></li>'
        )
    return Section("Findings", f'<ul class="findings">{"".join(items)}</ul>') if items else None
