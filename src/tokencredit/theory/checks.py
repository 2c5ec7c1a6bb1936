"""What is true of the claims about token gradients, weights, GTPO and GRPO: every statement with a check that
recomputes its figures.

One module per family of statements; proofs and counter-examples in full: docs/theory.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from tokencredit.theory import (
    entropy,
    grpo,
    gtpo,
    means,
    network,
    soft,
    variance,
    weighting,
)
from tokencredit.theory.statement import Statement

FAMILIES = (entropy, network, variance, weighting, gtpo, means, grpo, soft)
STATEMENTS: dict[str, Statement] = {each.key: each for family in FAMILIES for each in family.STATEMENTS}


def select(names: Sequence[str] | None = None) -> list[Statement]:
    """The statements of these names, in any case; all without names. ValueError names the nearest where there is
    none.
    """
    known = {key.lower(): each for key, each in STATEMENTS.items()}
    for name in names or ():
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
            hint = f" Did you mean {known[near[0]].key!r}?" if near else ""
            raise ValueError(f"no statement is called {name!r}.{hint} Statements: {', '.join(STATEMENTS)}")
    return (
        [known[name] for name in dict.fromkeys(each.lower() for each in names)] if names else list(STATEMENTS.values())
    )


def run(names: Sequence[str] | None = None, say: Callable[[str], Any] = lambda key: None) -> dict[str, Any]:
    """{"passed", "statements": {key: text, verdict, source, sharp, figures, conditions, passed}}; `say` hears each key
    before its check.
    """
    found = {}
    for statement in select(names):
        say(statement.key)
        found[statement.key] = statement.report()
    return {"passed": all(each["passed"] for each in found.values()), "statements": found}
