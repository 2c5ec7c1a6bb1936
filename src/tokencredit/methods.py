"""METHODS: every published method as one entry of one table, and `Method`, what an entry is."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import Tensor

from tokencredit import credit as _credit
from tokencredit import objective as _objective
from tokencredit.credit import (
    BatchWhiten,
    Chain,
    EntropyBonus,
    EntropyReward,
    GroupCenter,
    LeaveOneOut,
    Outcome,
    Overlong,
    PolarityCenter,
    ProxyWeight,
    Score,
    TopFraction,
)
from tokencredit.masked import wide, zero_off
from tokencredit.objective import (
    CISPO,
    GPPO,
    SAPO,
    Aggregate,
    Clip,
    ClipCov,
    KLCov,
    LogProb,
    SelectedMean,
    SequenceClip,
    SequenceMean,
    SequenceSum,
    Surrogate,
    TokenMean,
)
from tokencredit.rollouts import Rollouts

PARTS = ("chain", "surrogate", "aggregate")


@dataclass(frozen=True, eq=False)
class Plan:
    """What the loss takes from the whole rollout batch before it is split: token weights ω [B, T] and selected tokens [B, T] or None."""

    weight: Tensor
    selected: Tensor | None

    def rows(self, keep: Tensor) -> Plan:
        return Plan(self.weight[keep], None if self.selected is None else self.selected[keep])


@dataclass(frozen=True)
class Method:
    """A way to train: credit chain + surrogate + aggregate + group filter, with its source.

    fidelity  "paper"; "code", where paper and released code disagree and the code is followed; "reconstructed", from an abstract
    mixed_groups_only  DAPO's dynamic sampling: engines draw again until every group holds both a success and a failure
    """

    name: str
    chain: Chain
    surrogate: Surrogate
    aggregate: Aggregate
    mixed_groups_only: bool = False
    summary: str = ""
    source: str = ""
    fidelity: str = "paper"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores this method reads."""
        return self.chain.needs | self.surrogate.needs | self.aggregate.needs

    def credit(self, rollouts: Rollouts) -> Tensor:
        """The credit of every token: [B, T], float, 0 off the mask, no gradient. KeyError names a missing score."""
        missing = sorted(self.needs - set(rollouts.scores))
        if missing:
            there = ", ".join(sorted(rollouts.scores)) or "none"
            raise KeyError(f"{self.name} needs the scores {', '.join(missing)}; these rollouts have: {there}")
        return self.chain(rollouts.reward.new_zeros(rollouts.mask.shape), rollouts)

    def plan(self, *, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Plan:
        """Token weights and selections over the whole rollout batch; engines make it once and slice it with the micro-batches."""
        logprob, old_logprob, credit = (zero_off(wide(x.detach()), rollouts.mask) for x in (logprob, old_logprob, credit))
        return Plan(self.aggregate.weights(rollouts), self.surrogate.select(logprob, old_logprob, credit, rollouts))

    def loss(
        self, *, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts, plan: Plan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, stats): L = Σᵢₜ ωᵢₜ ℓᵢₜ, a scalar with the gradient of logprob [B, T]; stats are detached 0-dim tensors.

        Give a slice of the batch's `plan` with a micro-batch: then the losses of the micro-batches add up to the loss of the batch.
        """
        for name, x in (("logprob", logprob), ("old_logprob", old_logprob), ("credit", credit)):
            if x.shape != rollouts.mask.shape:
                raise ValueError(f"{name} must be [B, T] = {list(rollouts.mask.shape)}, got shape {list(x.shape)}")
        plan = plan or self.plan(logprob=logprob, old_logprob=old_logprob, credit=credit, rollouts=rollouts)
        if plan.weight.shape != rollouts.mask.shape:
            shapes = f"{list(plan.weight.shape)}, the rollouts are {list(rollouts.mask.shape)}"
            raise ValueError(f"plan is for {shapes}: slice both with the same rows, plan.rows(keep)")
        per_token, stats = self.surrogate(logprob, old_logprob, credit, rollouts.mask, plan.selected)
        return (plan.weight * per_token).sum(), stats

    def replace(self, **values) -> Method:
        """This method with other hyper-parameters: any field of its chain, surrogate, aggregate or of its own.

            METHODS["gtpo"].replace(alpha=(1, 0.2), scope="batch")

        A name sets every part that has such a field. Write {"Clip.high": 0.3} to set one part's. ValueError names the fields there are.
        """
        own = {f.name for f in fields(self)}
        changed = replace(self, **{k: v for k, v in values.items() if k in own})
        inner = {k: v for k, v in values.items() if k not in own}
        used: set[str] = set()
        parts = {name: _replace(getattr(changed, name), inner, used) for name in PARTS}
        unknown = sorted(set(inner) - used)
        if unknown:
            raise ValueError(f"{self.name} has no field {', '.join(unknown)}; it has: {', '.join(sorted(self.hyperparameters()))}")
        return replace(changed, **parts)

    def hyperparameters(self) -> dict[str, object]:
        """{"Part.field": value} for every field of every part."""
        found: dict[str, object] = {}
        for name in PARTS:
            _collect(getattr(self, name), found)
        return found

    def within(self, max_length: int) -> Method:
        """This method for completions of at most `max_length` tokens: fills in every `max_length` that is None."""
        return replace(self, **{name: _fill(getattr(self, name), max_length) for name in PARTS})


def _replace(part, values: dict, used: set[str]):
    if isinstance(part, Chain):
        return Chain(*(_replace(p, values, used) for p in part.parts))
    new = {}
    for f in fields(part):
        for key in (f.name, f"{type(part).__name__}.{f.name}"):
            if key in values:
                new[f.name] = values[key]
                used.add(key)
        inner = getattr(part, f.name)
        if f.name not in new and is_dataclass(inner):
            new[f.name] = _replace(inner, values, used)
    return replace(part, **new) if new else part


def _fill(part, max_length: int):
    """The part with every `max_length` that is None set."""
    if isinstance(part, Chain):
        return Chain(*(_fill(p, max_length) for p in part.parts))
    new = {f.name: _fill(inner, max_length) for f in fields(part) if is_dataclass(inner := getattr(part, f.name))}
    if getattr(part, "max_length", max_length) is None:
        new["max_length"] = max_length
    return replace(part, **new) if new else part


def _collect(part, found: dict) -> None:
    for inner in part.parts if isinstance(part, Chain) else ():
        _collect(inner, found)
    for f in fields(part) if not isinstance(part, Chain) else ():
        value = getattr(part, f.name)
        if is_dataclass(value):
            _collect(value, found)
        else:
            found[f"{type(part).__name__}.{f.name}"] = value


def parse(text: str, **known: type) -> Method:
    """The method whose `repr` is `text`. Only constructor calls and literals are read; nothing is evaluated.

    A transform of your own is read when its class is given by name: parse(text, MyTransform=MyTransform). ValueError otherwise.
    """
    parts = {n: getattr(m, n) for m in (_credit, _objective) for n in m.__all__}
    names = {n: c for n, c in parts.items() if isinstance(c, type)} | {"Method": Method} | known

    def build(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
            if node.func.id not in names:
                raise ValueError(f"unknown part {node.func.id}: give its class, parse(text, {node.func.id}={node.func.id})")
            return names[node.func.id](*map(build, node.args), **{k.arg: build(k.value) for k in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(map(build, node.elts))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
            return -build(node.operand)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return float(node.id)
        return ast.literal_eval(node)

    try:
        method = build(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"not the repr of a method: {text[:80]} ({error})") from error
    if not isinstance(method, Method):
        raise ValueError(f"not the repr of a method but of a {type(method).__name__}: {text[:80]}")
    return method


class Methods(dict[str, Method]):
    """A dict of methods by name whose KeyError gives the nearest name."""

    def __missing__(self, name: str) -> Method:
        near = difflib.get_close_matches(str(name), self, n=1, cutoff=0.4)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise KeyError(f'no method "{name}".{hint} There are: {", ".join(self)}')


def _table(*methods: Method) -> Methods:
    return Methods({m.name: m for m in methods})


_group = Chain(Outcome(), GroupCenter())
_top = TopFraction("entropy", 0.2)

METHODS = _table(
    Method(
        "reinforce", Chain(Outcome()), LogProb(), SequenceSum(1),
        summary="the reward itself, no baseline",
        source="Williams 1992",
    ),
    Method(
        "grpo", _group, Clip(0.2, 0.2), SequenceMean(),
        summary="reward against its group, the same for every token",
        source="DeepSeekMath, arXiv:2402.03300 eqs. 3-4; its KL term is the engine's beta",
    ),
    Method(
        "dr_grpo", Chain(Outcome(), GroupCenter(scale="none")), Clip(0.2, 0.2), SequenceSum(),
        summary="no division by std or by length",
        source="Understanding R1-Zero-like training, arXiv:2503.20783 eq. 5",
    ),
    Method(
        "rloo", Chain(Outcome(), LeaveOneOut()), LogProb(), SequenceSum(1),
        summary="leave-one-out baseline, plain policy gradient",
        source="Back to basics, arXiv:2402.14740 eq. 8; its KL penalty inside the reward is left to the verifier",
    ),
    Method(
        "reinforce_pp_baseline", Chain(Outcome(), GroupCenter(scale="none"), BatchWhiten()), Clip(0.2, 0.2), TokenMean(),
        summary="group mean subtracted, then standardised over all tokens of the batch",
        source="REINFORCE++, arXiv:2501.03262 sec. 3; verl's masked whitening", fidelity="code",
    ),
    Method(
        "dapo", Chain(Outcome(), Overlong(), GroupCenter()), Clip(0.2, 0.28), TokenMean(), mixed_groups_only=True,
        summary="clip-higher, token mean, soft overlong punishment, dynamic sampling",
        source="DAPO, arXiv:2503.14476 eqs. 8-13",
    ),
    Method(
        "gspo", _group, SequenceClip(3e-4, 4e-4), SequenceMean(),
        summary="one geometric-mean ratio per rollout",
        source="GSPO, arXiv:2507.18071 eqs. 5-7",
    ),
    Method(
        "gspo_token", _group, SequenceClip(3e-4, 4e-4, token=True), SequenceMean(),
        summary="GSPO whose tokens may carry their own credit",
        source="GSPO, arXiv:2507.18071 eqs. 13-14",
    ),
    Method(
        "cispo", _group, CISPO(cap=5.0), TokenMean(),
        summary="capped importance weights that never stop a gradient",
        source="MiniMax-M1, arXiv:2506.13585 eqs. 4-5; the cap's value from later work", fidelity="code",
    ),
    Method(
        "sapo", _group, SAPO(1.0, 1.05), SequenceMean(),
        summary="a soft gate on the ratio in place of the clip",
        source="SAPO, arXiv:2511.20347 eqs. 5-6",
    ),
    Method(
        "gtpo", Chain(EntropyReward(), PolarityCenter()), Clip(0.2, 0.28), TokenMean(),
        summary="token rewards shaped by entropy: uncertain tokens of successes gain, confident tokens of failures lose",
        source="GTPO, arXiv:2508.04349v6 eqs. 3-7",
    ),
    Method(
        "grpo_s", Chain(EntropyReward(level="sequence"), PolarityCenter(level="sequence")), SequenceClip(0.2, 0.28, mean="arithmetic"),
        SequenceMean(),
        summary="rollout rewards shaped by mean entropy, arithmetic-mean sequence ratio",
        source="GRPO-S, arXiv:2508.04349v6 eqs. 8-11",
    ),
    Method(
        "gtpo_geometric", Chain(EntropyReward(mean="geometric"), PolarityCenter()), Clip(0.2, 0.28), TokenMean(),
        summary="GTPO compared with geometric means",
        source="GTPO, arXiv:2508.04349v6 appendix C",
    ),
    Method(
        "grpo_s_geometric", Chain(EntropyReward(level="sequence", mean="geometric"), PolarityCenter(level="sequence")),
        SequenceClip(0.2, 0.28), SequenceMean(),
        summary="GRPO-S with geometric means of entropies and ratios",
        source="GRPO-S, arXiv:2508.04349v6 appendix C",
    ),
    Method(
        "gtpo_2025_08", Chain(EntropyReward(alpha=(0.9, 0.1), failures=False), PolarityCenter(population="joint")), Clip(0.2, 0.28),
        TokenMean(),
        summary="GTPO as first published: only successes are shaped, one standardisation",
        source="GTPO before v6, read in a third-party reproduction of its equations", fidelity="reconstructed",
    ),
    Method(
        "forking_tokens", Chain(Outcome(), Overlong(), GroupCenter(), _top), Clip(0.2, 0.28), SelectedMean(_top),
        mixed_groups_only=True,
        summary="DAPO on the 20 % of tokens with the highest entropy",
        source="Beyond the 80/20 rule, arXiv:2506.01939 eq. 5",
    ),
    Method(
        "entropy_advantage", Chain(Outcome(), GroupCenter(), EntropyBonus(0.4, 2.0)), Clip(0.2, 0.28), TokenMean(),
        summary="a bounded entropy bonus added to the credit",
        source="Reasoning with exploration, arXiv:2506.14758 eqs. 5-6",
    ),
    Method(
        "clip_cov", _group, ClipCov(), TokenMean(),
        summary="a few tokens of high covariance get no gradient",
        source="The entropy mechanism, arXiv:2505.22617 eqs. 11-12", fidelity="code",
    ),
    Method(
        "kl_cov", _group, KLCov(), TokenMean(),
        summary="the tokens of highest covariance are tied to the old policy",
        source="The entropy mechanism, arXiv:2505.22617 eqs. 13-14", fidelity="code",
    ),
    Method(
        "ce_gppo", _group, GPPO(), TokenMean(),
        summary="clipped tokens keep a bounded gradient",
        source="CE-GPPO, arXiv:2509.20712, released compute_gppo_loss_general_beta", fidelity="code",
    ),
    Method(
        "ptw_entropy", Chain(Outcome(), GroupCenter(), ProxyWeight("entropy")), Clip(0.2, 0.2), TokenMean(),
        summary="group credit weighted by min-max normalised entropy",
        source="proxy token weighting, defined here: w = (H − min H)/(max H − min H) per rollout",
    ),
    Method(
        "ptw_fisher", Chain(Outcome(), GroupCenter(), ProxyWeight("fisher_trace")), Clip(0.2, 0.2), TokenMean(),
        summary="group credit weighted per token by the trace of its position's Fisher matrix",
        source="proxy token weighting, defined here: w from E_{v~p} ‖∇ log p(v)‖², min-max per rollout",
    ),
    Method(
        "ptw_gradient_norm", Chain(Outcome(), GroupCenter(), ProxyWeight("gradient_norm")), Clip(0.2, 0.2), TokenMean(),
        summary="group credit weighted per token by the norm of its log-prob's gradient",
        source="proxy token weighting, defined here: w from ‖∇ log p(t)‖, min-max per rollout",
    ),
    Method(
        "ptw_perturbation", Chain(Outcome(), GroupCenter(), ProxyWeight("perturbation_variance")), Clip(0.2, 0.2), TokenMean(),
        summary="group credit weighted per token by how much its probability varies under perturbed weights",
        source="proxy token weighting, defined here: w from p(t)² ‖∇ log p(t)‖², the first-order variance, min-max per rollout",
    ),
    Method(
        "ptw_attention", Chain(Outcome(), GroupCenter(), ProxyWeight("attention")), Clip(0.2, 0.2), TokenMean(),
        summary="group credit weighted per token by the attention it receives from later tokens",
        source="proxy token weighting, defined here: w from attention received per later query, min-max per rollout",
    ),
    Method(
        "exact_value", Chain(Score("exact_value")), Clip(0.2, 0.2), TokenMean(),
        summary="Q − V of the policy itself, from the prefix tree: the ceiling of every proxy",
        source="policy gradient theorem (Sutton et al. 2000)",
    ),
)  # fmt: skip
