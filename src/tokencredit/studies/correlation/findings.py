"""What the correlation study found, in sentences made from its figures, and a sample of its tokens for the scatter
plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tokencredit.agreement.ranks import midranks
from tokencredit.agreement.rollouts import ESTIMANDS, AlternativeRollouts
from tokencredit.figure import Figure
from tokencredit.studies.correlation.proxy_figures import Tokens

POINTS = 500
ASKS = {
    "before_after": "credit (before_after)",
    "spread": "how much a position decides (spread)",
    "replace": "replacing a token (replace)",
}


def findings(study: Mapping[str, Any], figures: Mapping[str, Figure], config: Any) -> list[str]:
    """One sentence per question that the study can answer."""
    said = [_best(study, figures, estimand, config.top) for estimand in ("before_after", "spread", "replace")]
    said += [sentence for estimand in ESTIMANDS if (sentence := _noise(study, figures, estimand))]
    tests = study["conditions"]["hypothesis"]["policies and temperatures"]
    return said + ([_calibration(tests, figures)] if tests["conditions"] >= 3 else [])


def _calibration(tests: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The hypothesis is supported or contradicted only where the captured share and Spearman, both clear, say the
    same.
    """
    verdicts, parts = [], []
    for measure, label in (("captured", "the share captured by entropy"), ("spearman", "entropy's Spearman")):
        figure = figures[tests[measure]]
        verdicts.append(figure.sign if figure.more["p"] <= 0.05 else 0)
        parts.append(f"{figure.text('.2f')} with {label} (permutation p = {figure.more['p']:.2f})")
    verdict = {(1, 1): "contradicts it", (-1, -1): "supports it"}.get(tuple(verdicts), "does not decide it")
    return (
        f"Hypothesis, entropy is a good proxy when the model is calibrated: over {tests['conditions']} policies and"
        f" temperatures the calibration error correlates {' and '.join(parts)}; this {verdict}. The conditions share"
        " prompts and a base, so that p, which deals them out as if they did not, is no test."
    )


def _best(study: Mapping[str, Any], figures: Mapping[str, Figure], estimand: str, top: float) -> str:
    block = study["exact"].get(estimand) or study["sampled"][estimand]
    shares = {
        proxy: figures[name] for proxy, name in block["measures"]["captured"].items() if not proxy.startswith("(")
    }
    order = sorted(shares, key=lambda proxy: -shares[proxy].value)
    sentence = (
        f"For {ASKS[estimand]} the best proxy is {order[0]}: the {top:.0%} of tokens that it ranks highest hold "
        f"{shares[order[0]].text('.2f')} of the squared effects"
    )
    if "entropy" in shares and order[0] != "entropy":
        test = block["comparisons"]["captured"].get(order[0], {}).get("holm", 1.0)
        sentence += f"; entropy's hold {shares['entropy'].text('.2f')} (difference: Holm p = {test:.3f})"
    return sentence + "."


def _noise(study: Mapping[str, Any], figures: Mapping[str, Figure], estimand: str) -> str | None:
    sampled = study["sampled"][estimand]
    if not sampled["resolved"]:
        return f"{estimand}: {sampled['verdict']}; no corrected correlation is given."
    if "entropy" not in sampled["noise_only"]:
        return None
    naive, null = figures[sampled["measures"]["spearman"]["entropy"]], figures[sampled["noise_only"]["entropy"]]
    sentence = f"{estimand}: entropy's naive Spearman is {naive.text('.2f')}; noise alone gives {null.text('.2f')}"
    if estimand in study["validation"]:
        check = study["validation"][estimand]
        naive_error, corrected_error = (check[name]["mean_error"] for name in ("spearman (naive)", "corrected_ranks"))
        sentence += (
            f". Against the exact effects the naive correlations are off by {naive_error:.3f} on average over proxies,"
            f" the corrected ones by {corrected_error:.3f}"
        )
    return sentence + "."


def scatter(
    tokens: Tokens,
    rollouts: AlternativeRollouts,
    exact: Mapping[str, np.ndarray] | None,
    defined: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """A random sample of tokens: each proxy's rank in [0, 1] and the effects, exact where they are known, with their
    role.
    """
    size = len(tokens.prompt)
    some = np.sort(np.random.default_rng(seed).permutation(size)[:POINTS])
    ranks = {
        name: midranks(x, np.ones((1, size)))[0][some] / size
        for name, x in tokens.proxies.items()
        if not name.startswith("(")
    }
    effects = rollouts.effects()
    known = exact or {name: effects.size(name) if name == "spread" else getattr(effects, name) for name in ESTIMANDS}
    roles = [name.removeprefix("role ") for name in tokens.groups if name.startswith("role ")]
    role = np.stack([tokens.groups[f"role {name}"][some] for name in roles]).argmax(0).tolist() if roles else None
    return {
        "ranks": ranks,
        "effects": {name: known[name][defined][some] for name in ESTIMANDS},
        "roles": roles,
        "role": role,
        "source": "exact" if exact is not None else "from rollouts",
    }
