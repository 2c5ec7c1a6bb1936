"""RELATED: entries of METHODS from papers of which no full text was read, or whose score has to be given; what else
there is, and what cannot be had here, says docs/related.md.
"""

from __future__ import annotations

import math

from tokencredit.credit import (
    Amplify,
    BatchWhiten,
    Below,
    Chain,
    ColumnCenter,
    ConfidenceBonus,
    EntropyGradient,
    GroupCenter,
    GroupWeight,
    LeaveOneOut,
    Outcome,
    Redistribute,
    Returns,
    Score,
    Sum,
    ToGo,
    TokenLeaveOneOut,
    TokenReward,
)
from tokencredit.method import Method
from tokencredit.objective import Clip, HybridClip, LowEntropyKL, SelectedMean, SequenceMean, TokenMean

_group = Chain(Outcome(), GroupCenter())
_unsure = Below("logprob", math.log(0.9))

RELATED = (
    Method(
        "arm",
        Chain(Outcome(), GroupCenter(), ConfidenceBonus()),
        Clip(0.2, 0.28),
        TokenMean(),
        summary="confident rollouts get less, by the probability of their least likely tokens",
        source="ProGRPO (mechanism: ARM), arXiv:2602.05281, from three digests; the prompt's confidence is left out",
        fidelity="reconstructed",
    ),
    Method(
        "dhpo",
        _group,
        HybridClip(),
        SequenceMean(),
        summary="token ratio and rollout ratio, clipped apart and averaged; mix='entropy' mixes by entropy",
        source="DHPO, arXiv:2601.05607, from its abstract and a third party's notes",
        fidelity="reconstructed",
    ),
    Method(
        "sent",
        _group,
        LowEntropyKL(),
        TokenMean(),
        summary="of the tokens of low entropy, those with extreme covariance are tied to the old policy",
        source=(
            "SENT, arXiv:2512.04359, released low_entropy_kl_cov_v2 as it was meant: by its integer mask it reads the"
            " covariances of other tokens. Its order of prompts, by semantic entropy, is not part of it"
        ),
        fidelity="code",
    ),
    Method(
        "tw_grpo",
        Chain(Outcome(), GroupCenter(), GroupWeight("js_divergence", 1.7)),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="more credit where the group's next-token distributions differ",
        source=(
            "TW-GRPO, arXiv:2505.24718, with the Jensen-Shannon divergence in place of the released code's (no KL, and"
            " not detached)"
        ),
        fidelity="reconstructed",
    ),
    Method(
        "rto_group",
        Chain(Outcome(), ToGo("implicit_reward", 0.05, clip=0.05), ColumnCenter()),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="token rewards of a DPO policy added to the outcome, against the group at the same position",
        source="RTO, arXiv:2404.18922, released rewards; siblings take the place of its critic, the KL is the engine's",
        fidelity="reconstructed",
    ),
    Method(
        "grpo_process",
        Chain(Outcome(), GroupCenter(), TokenReward()),
        Clip(0.2, 0.2),
        SequenceMean(),
        summary="rewards of tokens or turns, normalised over the group, as returns beside the outcome",
        source=(
            "GRPO with process supervision, arXiv:2402.03300 sec. 4.1.3, beside the outcome as in MT-GRPO,"
            " arXiv:2505.11821"
        ),
        fidelity="reconstructed",
    ),
    Method(
        "hicra",
        Chain(Outcome(), GroupCenter(), Amplify("planning", 0.2, 0.2)),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="planning tokens are praised louder and blamed less",
        source="HICRA, arXiv:2509.03646, a third party's formula",
        fidelity="reconstructed",
    ),
    Method(
        "spro",
        Chain(Sum(_group, Chain(ToGo("self_reward", 0.05, past=True), ColumnCenter()))),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="how far the policy has left its reference so far, against the group at the same position",
        source="SPRO, arXiv:2507.01551, of which no equation could be read; 0.05 is PRIME's scale",
        fidelity="reconstructed",
    ),
    Method(
        "abc",
        Chain(Outcome(), Redistribute("attention", 0.8), ColumnCenter()),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="the reward paid out along the way in shares of attention, against the group at the same position",
        source=(
            "Attention-based credit, arXiv:2402.00782, released shares of its variant ABC-D; siblings take the place of"
            " its critic"
        ),
        fidelity="reconstructed",
    ),
    Method(
        "prime_offline",
        Chain(
            Sum(
                Chain(Outcome(), LeaveOneOut()),
                Chain(Score("implicit_reward"), TokenLeaveOneOut(), Returns()),
            ),
            BatchWhiten(),
        ),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="outcome and implicit token rewards, each against the group's others, as returns, standardised",
        source="PRIME, arXiv:2502.01456, released advantage; its reward model is not updated while training here",
        fidelity="code",
    ),
    Method(
        "spo_chain",
        Chain(Score("step_gain"), BatchWhiten(), _unsure),
        Clip(0.2, 0.2),
        SelectedMean(_unsure),
        summary="what each step gained, on the tokens that were less likely than 0.9",
        source=(
            "SPO-chain, arXiv:2505.23564, released mask and loss; steps of the task take the place of its segments of"
            " five unlikely tokens"
        ),
        fidelity="reconstructed",
    ),
    Method(
        "entropy_bonus",
        Chain(Outcome(), GroupCenter(), EntropyGradient(0.001)),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="GRPO's credit and the gradient of an entropy bonus with a constant coefficient",
        source="Williams and Peng 1991, as a score function; its option difficulty reconstructs AER, arXiv:2510.10959",
    ),
    Method(
        "entropy_bonus_adaptive",
        Chain(Outcome(), GroupCenter(), EntropyGradient(0.0, target=0.2)),
        Clip(0.2, 0.2),
        TokenMean(),
        summary="GRPO's credit and the gradient of an entropy bonus steered towards a target entropy",
        source="Skywork-OR1, arXiv:2505.22312, as in TRL's adaptive entropy; moved once per rollout batch",
        fidelity="code",
    ),
)
