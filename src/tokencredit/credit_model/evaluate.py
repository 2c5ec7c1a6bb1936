"""Does the model know what matters on prompts that it has not seen? Against every cheap proxy, on measured effects.

    captured     share of Σ (effect̂² − se²) in the fifth of the tokens with the largest score
    calibration  Σ (effect̂² − se²) / Σ size²                             1 where sizes are right on average
    alignment    Σ credit · effect̂ / √(Σ credit² Σ (effect̂² − se²))      the cosine with the true effects

effect̂² − se² is unbiased for the square of the effect, so noise of the labels adds none; intervals are by prompt, and
differences are of the same draws of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tokencredit.agreement.ranks import share_of_top
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.credit_model.features import SCORES, TokenFeatures
from tokencredit.credit_model.labels import Labels
from tokencredit.credit_model.model import CreditModel, same_prompts
from tokencredit.figure import Figure
from tokencredit.stats import Estimate

TOP = 0.2
PROXIES = {
    "surprisal": ("logprob", -1),
    "entropy": ("entropy", 1),
    "rarity": ("rarity", 1),
    "varentropy": ("varentropy", 1),
}
LEARNED = "learned_size"


@dataclass(frozen=True)
class Appraisal:
    """captured {score: Figure}, the learned size less each of the others in `difference`, calibration, alignment; and
    how many of the prompts the model has seen.
    """

    captured: dict[str, Figure]
    difference: dict[str, Figure]
    calibration: Figure
    alignment: Figure
    seen: int
    tokens: int
    prompts: int

    def figures(self) -> dict[str, Figure]:
        """All of them by name, as a result holds them."""
        found = {f"captured/{name}": figure for name, figure in self.captured.items()}
        found |= {f"{LEARNED} less {name}": figure for name, figure in self.difference.items()}
        return found | {"calibration": self.calibration, "alignment": self.alignment}


def evaluate(
    model: CreditModel, found: TokenFeatures, labels: Labels, *, bootstraps: int = 1000, seed: int = 0
) -> Appraisal:
    """The figures on a pivotality run of other prompts; `seen` says how many of them were not other ones."""
    size, credit = model.size(found).double().numpy(), model.credit(found).double().numpy()
    scores = {LEARNED: size, "|learned_credit|": np.abs(credit)}
    scores |= {
        name: sign * found.scores[:, SCORES.index(column)].double().numpy() for name, (column, sign) in PROXIES.items()
    }
    square, effect = labels.size.numpy(), labels.effect.numpy()
    bootstrap = Bootstrap(labels.prompt.numpy(), bootstraps, seed)
    draws = {name: share_of_top(x, square, TOP, bootstrap.weights, per_token=False) for name, x in scores.items()}
    sums = bootstrap.sums(np.stack([square, size**2, credit * effect, credit**2], 1))
    below = np.sqrt(np.maximum(sums[:, 3] * sums[:, 0], 0))
    alignment = np.divide(sums[:, 2], below, out=np.full(len(sums), np.nan), where=below > 0)
    return Appraisal(
        {name: Figure.of(bootstrap.estimate(x), "share") for name, x in draws.items()},
        {
            name: Figure.of(_turned(each["difference"]), "share", more={"p": each["p"], "holm": each["holm"]})
            for name, each in compare(bootstrap, draws, LEARNED).items()
        },
        Figure.of(bootstrap.estimate(sums[:, 0] / np.maximum(sums[:, 1], 1e-300)), "1"),
        Figure.of(bootstrap.estimate(alignment), "cosine"),
        same_prompts(model.card, labels.prompts),
        len(square),
        bootstrap.num_clusters,
    )


def _turned(estimate: Estimate) -> Estimate:
    """The other less the baseline, turned round."""
    return replace(estimate, value=-estimate.value, low=-estimate.high, high=-estimate.low)
