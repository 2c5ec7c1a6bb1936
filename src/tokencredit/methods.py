"""METHODS: every published method as one entry of one table; `method` says what an entry is."""

from __future__ import annotations

import difflib
from typing import TypeVar

from tokencredit.credit import (
    Above,
    BatchWhiten,
    Chain,
    EntropyBonus,
    EntropyReward,
    GroupCenter,
    LeaveOneOut,
    OptimalTokenBaseline,
    Outcome,
    Overlong,
    PolarityCenter,
    ProxyWeight,
    Score,
    TokenSampling,
    TopFraction,
)
from tokencredit.method import Method, Plan, parse
from tokencredit.objective import (
    CISPO,
    GPPO,
    SAPO,
    Clip,
    ClipCov,
    KLCov,
    LogProb,
    SelectedMean,
    SequenceClip,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from tokencredit.related import RELATED

__all__ = ["METHODS", "Method", "Methods", "Plan", "parse"]


Entry = TypeVar("Entry")


class Methods(dict[str, Entry]):
    """A dict of methods by name whose KeyError gives the nearest name."""

    def __missing__(self, name: str) -> Entry:
        near = difflib.get_close_matches(str(name), self, n=1, cutoff=0.4)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise KeyError(f'no method "{name}".{hint} There are: {", ".join(self)}')


def _table(*methods: Method) -> Methods[Method]:
    return Methods({m.name: m for m in methods})


_group = Chain(Outcome(), GroupCenter())
_top, _random, _oracle = TopFraction("entropy", 0.2), TopFraction("uniform", 0.2), Above("oracle_positions")

METHODS = _table(
    Method(
        "reinforce",
        Chain(Outcome()),
        LogProb(),
        SequenceSum(1),
        summary="the reward itself, no baseline",
        source="Williams 1992",
    ),
    Method(
        "grpo",
        _group,
        Clip(0.2, 0.2),
        SequenceMean(),
        summary="reward against its group, the same for every token",
        source="DeepSeekMath, arXiv:2402.03300 eqs. 3-4; its KL term is the engine's beta",
    ),
    Method(
        "dr_grpo",
        Chain(Outcome(), GroupCenter(scale="none")),
        Clip(0.2, 0.2),
        SequenceSum(),
        summary="no division by std or by length",
        source="Understanding R1-Zero-like training, arXiv:2503.20783 eq. 5",
    ),
    Method(
        "rloo",
        Chain(Outcome(), LeaveOneOut()),
        LogProb(),
        SequenceSum(1),
        summary="leave-one-out baseline, plain policy gradient",
        source="Back to basics, arXiv:2402.14740 eq. 8; its KL penalty inside the reward is left to the verifier",
    ),
    Method(
        "reinforce_pp_baseline",
        Chain(Outcome(), GroupCenter(scale="none"), BatchWhiten()),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group mean subtracted, then standardised over all tokens of the batch",
        source="REINFORCE++, arXiv:2501.03262 sec. 3; verl's masked whitening",
        fidelity="code",
    ),
    Method(
        "otb",
        Chain(Outcome(), OptimalTokenBaseline()),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="a baseline per position: the group's reward weighted by how far each rollout has moved the logits",
        source="Optimal token baseline, arXiv:2602.07078; verl's optimal_token_baseline",
        fidelity="code",
    ),
    Method(
        "dapo",
        Chain(Outcome(), Overlong(), GroupCenter()),
        Clip(0.2, 0.28),
        TokenMean(),
        mixed_groups_only=True,
        summary="clip-higher, token mean, soft overlong punishment, dynamic sampling",
        source="DAPO, arXiv:2503.14476 eqs. 8-13; for rewards of 0 and 1 its outcome of −1 and 1 halves the punishment",
    ),
    Method(
        "gspo",
        _group,
        SequenceClip(3e-4, 4e-4),
        SequenceMean(),
        summary="one geometric-mean ratio per rollout",
        source="GSPO, arXiv:2507.18071 eqs. 5-7",
    ),
    Method(
        "gspo_token",
        _group,
        SequenceClip(3e-4, 4e-4, token=True),
        SequenceMean(),
        summary="GSPO whose tokens may carry their own credit",
        source="GSPO, arXiv:2507.18071 eqs. 13-14",
    ),
    Method(
        "cispo",
        _group,
        CISPO(cap=5.0),
        TokenMean(),
        summary="capped importance weights that never stop a gradient",
        source="MiniMax-M1, arXiv:2506.13585 eqs. 4-5; the cap's value from later work",
        fidelity="code",
    ),
    Method(
        "sapo",
        _group,
        SAPO(1.0, 1.05),
        SequenceMean(),
        summary="a soft gate on the ratio in place of the clip",
        source="SAPO, arXiv:2511.20347 eqs. 5-6",
    ),
    Method(
        "gtpo",
        Chain(EntropyReward(), PolarityCenter()),
        Clip(0.2, 0.28),
        TokenMean(),
        summary=(
            "token rewards shaped by entropy: uncertain tokens of successes gain, confident tokens of failures lose"
        ),
        source="GTPO, arXiv:2508.04349v6 eqs. 3-7",
    ),
    Method(
        "grpo_s",
        Chain(EntropyReward(level="sequence"), PolarityCenter(level="sequence")),
        SequenceClip(0.2, 0.28, mean="arithmetic"),
        SequenceMean(),
        summary="rollout rewards shaped by mean entropy, arithmetic-mean sequence ratio",
        source="GRPO-S, arXiv:2508.04349v6 eqs. 8-11",
    ),
    Method(
        "gtpo_geometric",
        Chain(EntropyReward(mean="geometric"), PolarityCenter()),
        Clip(0.2, 0.28),
        TokenMean(),
        summary="GTPO compared with geometric means",
        source="GTPO, arXiv:2508.04349v6 appendix C",
    ),
    Method(
        "grpo_s_geometric",
        Chain(EntropyReward(level="sequence", mean="geometric"), PolarityCenter(level="sequence")),
        SequenceClip(0.2, 0.28),
        SequenceMean(),
        summary="GRPO-S with geometric means of entropies and ratios",
        source="GRPO-S, arXiv:2508.04349v6 appendix C",
    ),
    Method(
        "gtpo_2025_08",
        Chain(EntropyReward(alpha=(0.9, 0.1), failures=False), PolarityCenter(population="joint")),
        Clip(0.2, 0.28),
        TokenMean(),
        summary="GTPO as first published: only successes are shaped, one standardisation",
        source="GTPO before v6, read in a third-party reproduction of its equations",
        fidelity="reconstructed",
    ),
    Method(
        "forking_tokens",
        Chain(Outcome(), Overlong(), GroupCenter(), _top),
        Clip(0.2, 0.28),
        SelectedMean(_top),
        mixed_groups_only=True,
        summary="DAPO on the 20 % of tokens with the highest entropy",
        source="Beyond the 80/20 rule, arXiv:2506.01939 eq. 5",
    ),
    Method(
        "random_tokens",
        Chain(Outcome(), Overlong(), GroupCenter(), _random),
        Clip(0.2, 0.28),
        SelectedMean(_random),
        mixed_groups_only=True,
        summary="DAPO on 20 % of the tokens, drawn at random: the control of forking_tokens",
        source="control, defined here: forking_tokens by a uniform draw in place of the entropy",
    ),
    Method(
        "oracle_positions",
        Chain(Outcome(), Overlong(), GroupCenter(), _oracle),
        Clip(0.2, 0.28),
        SelectedMean(_oracle),
        mixed_groups_only=True,
        summary=(
            "DAPO on the positions that decide the answer, by the task's own account: the ceiling of choosing positions"
        ),
        source="control, defined here: forking_tokens by the true positions in place of the entropy",
    ),
    Method(
        "entropy_advantage",
        Chain(Outcome(), GroupCenter(), EntropyBonus(0.4, 2.0)),
        Clip(0.2, 0.28),
        TokenMean(),
        summary="a bounded entropy bonus added to the credit",
        source="Reasoning with exploration, arXiv:2506.14758 eqs. 5-6",
    ),
    Method(
        "clip_cov",
        _group,
        ClipCov(),
        TokenMean(),
        summary="a few tokens of high covariance get no gradient",
        source="The entropy mechanism, arXiv:2505.22617 eqs. 11-12",
        fidelity="code",
    ),
    Method(
        "kl_cov",
        _group,
        KLCov(),
        TokenMean(),
        summary="the tokens of highest covariance are tied to the old policy",
        source="The entropy mechanism, arXiv:2505.22617 eqs. 13-14",
        fidelity="code",
    ),
    Method(
        "ce_gppo",
        _group,
        GPPO(),
        TokenMean(),
        summary="clipped tokens keep a bounded gradient",
        source="CE-GPPO, arXiv:2509.20712, released compute_gppo_loss_general_beta",
        fidelity="code",
    ),
    Method(
        "ptw_entropy",
        Chain(Outcome(), GroupCenter(), ProxyWeight("entropy")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group credit weighted by min-max normalised entropy",
        source="proxy token weighting, defined here: w = (H − min H)/(max H − min H) per rollout",
    ),
    Method(
        "ptw_fisher",
        Chain(Outcome(), GroupCenter(), ProxyWeight("fisher_trace")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group credit weighted per token by the trace of its position's Fisher matrix",
        source="proxy token weighting, defined here: w from E_{v~p} ‖∇ log p(v)‖², min-max per rollout",
    ),
    Method(
        "ptw_gradient_norm",
        Chain(Outcome(), GroupCenter(), ProxyWeight("gradient_norm")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group credit weighted per token by the norm of its log-prob's gradient",
        source="proxy token weighting, defined here: w from ‖∇ log p(t)‖, min-max per rollout",
    ),
    Method(
        "ptw_perturbation",
        Chain(Outcome(), GroupCenter(), ProxyWeight("perturbation_variance")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group credit weighted per token by how much its probability varies under perturbed weights",
        source=(
            "proxy token weighting, defined here: w from p(t)² ‖∇ log p(t)‖², the first-order variance, min-max per"
            " rollout"
        ),
    ),
    Method(
        "ptw_attention",
        Chain(Outcome(), GroupCenter(), ProxyWeight("attention")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="group credit weighted per token by the attention it receives from later tokens",
        source="proxy token weighting, defined here: w from attention received per later query, min-max per rollout",
    ),
    Method(
        "token_sampling",
        Chain(Outcome(), GroupCenter(), TokenSampling("head_norm")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary=(
            "a random 20 % of the tokens, the likelier the larger their gradient, weighted to leave the mean gradient"
            " as it is"
        ),
        source="Horvitz and Thompson 1952, with the probabilities of least variance, q ∝ |c| ‖g‖",
    ),
    Method(
        "vineppo",
        Chain(Score("step_gain"), BatchWhiten()),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="what each reasoning step gained, by Monte-Carlo values at the steps' boundaries",
        source="VinePPO, arXiv:2410.01679, released whitening and PPO loss; its KL term is the engine's beta",
        fidelity="code",
    ),
    Method(
        "exact_value",
        Chain(Score("exact_value")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="Q − V of the policy itself, from the prefix tree: the ceiling of every proxy",
        source="policy gradient theorem (Sutton et al. 2000)",
    ),
    Method(
        "learned_credit",
        Chain(Score("learned_credit")),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="Q − V as a credit model expects it, fitted to re-sampled effects while training",
        source="of this library: docs/credit_model.md; after VinePPO's values and Q-RM's token rewards",
        fidelity="reconstructed",
    ),
    *RELATED,
)
