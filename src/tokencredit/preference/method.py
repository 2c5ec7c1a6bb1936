"""PreferenceMethod: what an entry of PREFERENCES is. A chain of credit is the token weighting."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from tokencredit.credit import Chain
from tokencredit.masked import over, wide, zero_off
from tokencredit.method import collect, replaced
from tokencredit.preference.links import Link, Logistic
from tokencredit.preference.pairs import Pairs

LOGISTIC = Logistic()


@dataclass(frozen=True)
class PreferenceMethod:
    """A way to learn from pairs: credit chain + link, with its source.

        m_p = β Σ_{i∈p} Σₜ cᵢₜ (log π_θ − log π_ref)ᵢₜ        L = Σ_p ω_p f(m_p) / Σ_p ω_p

    c is the chain's credit on rewards 1 (chosen) and −1 (rejected), without gradient: ∂L/∂log πᵢₜ = ω f'(m) β cᵢₜ, a
    policy gradient with credit c that is gated pair by pair. The chain Outcome() alone is DPO.

    reference_free  log π_ref is left out
    fidelity        as for `Method`
    """

    name: str
    chain: Chain
    link: Link = LOGISTIC
    beta: float = 0.1
    reference_free: bool = False
    summary: str = ""
    source: str = ""
    fidelity: str = "paper"

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be positive: it scales the margin; got {self.beta}")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores this method reads."""
        return self.chain.needs

    def credit(self, pairs: Pairs) -> Tensor:
        """[2P, T]: the signed weight of every token, 0 off the mask, no gradient. KeyError names a missing score."""
        missing = sorted(self.needs - set(pairs.scores))
        if missing:
            there = ", ".join(sorted(pairs.scores)) or "none"
            raise KeyError(f"{self.name} needs the scores {', '.join(missing)}; these pairs have: {there}")
        return self.chain(pairs.rollouts.reward.new_zeros(pairs.mask.shape), pairs.rollouts)

    def margin(self, *, logprob: Tensor, ref_logprob: Tensor | None, credit: Tensor, pairs: Pairs) -> Tensor:
        """[P]: m of every pair, with the gradient of logprob [2P, T]."""
        gap = zero_off(wide(logprob), pairs.mask)
        if not self.reference_free:
            if ref_logprob is None:
                raise ValueError(f"{self.name} compares with a reference: give ref_logprob [2P, T]")
            gap = gap - zero_off(wide(ref_logprob.detach()), pairs.mask)
        terms = (zero_off(credit.detach(), pairs.mask).to(gap.dtype) * gap).sum(1)
        return self.beta * (terms[: len(pairs)] + terms[len(pairs) :])

    def loss(
        self,
        *,
        logprob: Tensor,
        ref_logprob: Tensor | None = None,
        credit: Tensor,
        pairs: Pairs,
        total: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, stats): L, a scalar with the gradient of logprob; stats are detached 0-dim tensors.

        `total` is Σ ω over the whole batch, given with a micro-batch: then the losses of micro-batches add up to the
        batch's. None: of these pairs.
        """
        for name, x in (("logprob", logprob), ("ref_logprob", ref_logprob), ("credit", credit)):
            if x is not None and x.shape != pairs.mask.shape:
                raise ValueError(f"{name} must be [2P, T] = {list(pairs.mask.shape)}, got shape {list(x.shape)}")
        margin = self.margin(logprob=logprob, ref_logprob=ref_logprob, credit=credit, pairs=pairs)
        weight = pairs.weights.to(margin.dtype)
        whole = weight.sum() if total is None else margin.new_tensor(float(total))
        m, own = margin.detach(), weight.sum()
        stats = {
            "margin": over((weight * m).sum(), own),
            "accuracy": over((weight * (m > 0)).sum(), own),
        }
        return over((weight * self.link.loss(margin)).sum(), whole), stats

    def replace(self, **values) -> PreferenceMethod:
        """This method with other hyper-parameters: any field of its chain, link or of its own, as `Method.replace`."""
        own = {f.name for f in fields(self)}
        changed = replace(self, **{k: v for k, v in values.items() if k in own})
        inner = {k: v for k, v in values.items() if k not in own}
        used: set[str] = set()
        parts = {name: replaced(getattr(changed, name), inner, used) for name in ("chain", "link")}
        if unknown := sorted(set(inner) - used):
            there = ", ".join(sorted(self.hyperparameters()))
            raise ValueError(f"{self.name} has no field {', '.join(unknown)}; it has: {there}")
        return replace(changed, **parts)

    def hyperparameters(self) -> dict[str, object]:
        """{"Part.field": value} for every field of chain and link, and beta."""
        found: dict[str, object] = {"beta": self.beta}
        for part in (self.chain, self.link):
            collect(part, found)
        return found
