"""verl's own policy losses against ours on one micro-batch, and where they part on several.

Equal to rounding on one micro-batch, each with verl's settings in our fields. verl takes the means and the selections
of clip_cov and kl_cov from the micro-batch that it is in, ours come from the whole rollout batch: cut in two, verl's
losses no longer add up to those of the batch.
"""

import pytest
import torch
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from tokencredit import METHODS, Rollouts
from tokencredit.engines.verl.carried import carried
from tokencredit.objective import CISPO, SAPO, Clip, ClipCov, KLCov, LogProb, SequenceClip

DRAWN_ALL = 1.0


def actor(**changed):
    loss = {name: changed.pop(name) for name in list(changed) if name in PolicyLossConfig.__dataclass_fields__}
    config = FSDPActorConfig(
        rollout_n=4, ppo_micro_batch_size_per_gpu=8, policy_loss=PolicyLossConfig(**loss), **changed
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    return config


OURS = {
    "vanilla": (Clip(0.2, 0.28, dual=3.0), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}, "token-mean"),
    "gpg": (LogProb(), {}, "token-mean"),
    "gspo": (
        SequenceClip(3e-2, 4e-2, token=True),
        {"clip_ratio_low": 3e-2, "clip_ratio_high": 4e-2},
        "seq-mean-token-mean",
    ),
    "cispo": (CISPO(cap=1.28, floor=0.8), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}, "token-mean"),
    "sapo": (SAPO(1.0, 1.05), {"tau_pos": 1.0, "tau_neg": 1.05}, "seq-mean-token-mean"),
    # A draw of all in the band: which few are drawn is a matter of verl's unseeded generator.
    "clip_cov": (
        ClipCov(DRAWN_ALL, band=(0.1, 0.4), low=0.2, high=0.2),
        {"clip_cov_ratio": DRAWN_ALL, "clip_cov_lb": 0.1, "clip_cov_ub": 0.4},
        "token-mean",
    ),
    "kl_cov": (KLCov(0.2, beta=0.5), {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5}, "token-mean"),
}


@pytest.fixture(scope="module")
def batch():
    """(new log-probs, old ones, credit, mask): credit varies within rollouts, ratios leave the clips on both sides."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12) < torch.tensor([12, 5, 1, 9, 12, 7, 3, 10])[:, None]
    old = torch.rand(mask.shape, generator=generator).log()
    new = old + 0.3 * torch.randn(mask.shape, generator=generator)
    credit = torch.randn(mask.shape, generator=generator) * mask
    return new, old, credit, mask


def of_verl(name, options, mode, new, old, credit, mask):
    leaf = new.clone().requires_grad_()
    loss, _ = get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=leaf,
        advantages=credit,
        response_mask=mask,
        loss_agg_mode=mode,
        config=actor(**options),
    )
    loss.backward()
    return loss.detach(), leaf.grad


def of_ours(surrogate, mode, new, old, credit, mask, coefficient=None):
    leaf = new.clone().requires_grad_()
    loss = agg_loss(loss_mat=surrogate(leaf, old, credit, mask, coefficient)[0], loss_mask=mask, loss_agg_mode=mode)
    loss.backward()
    return loss.detach(), leaf.grad


def planned(surrogate, new, old, credit, mask):
    """verl selects by the log-probs of the policy that is trained."""
    rows = torch.zeros(len(mask))
    return surrogate.coefficient(new, old, credit, Rollouts(rows, rows.long(), mask))


@pytest.mark.parametrize("name", OURS)
def test_on_one_micro_batch_the_two_are_one(name, batch):
    surrogate, options, mode = OURS[name]
    coefficient = planned(surrogate, *batch)
    ours = of_ours(surrogate, mode, *batch, coefficient)
    theirs = of_verl(name, options, mode, *batch)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    if surrogate.plans:
        assert 0 < (coefficient > 0).sum() < batch[3].sum()


@pytest.mark.parametrize("name", OURS)
def test_on_two_micro_batches_only_statistics_of_the_batch_add_up(name, batch):
    """Each half's loss, with the weight that its tokens or rollouts have in the batch."""
    surrogate, options, mode = OURS[name]
    coefficient = planned(surrogate, *batch)
    halves = [slice(0, 4), slice(4, 8)]
    mask = batch[3]
    share = [mask[half].sum() / mask.sum() if mode == "token-mean" else 0.5 for half in halves]

    def added(loss_of):
        return sum(weight * loss_of(half)[0] for weight, half in zip(share, halves))

    def part(half):
        return [x[half] for x in batch]

    ours = added(lambda half: of_ours(surrogate, mode, *part(half), None if coefficient is None else coefficient[half]))
    torch.testing.assert_close(ours, of_ours(surrogate, mode, *batch, coefficient)[0], rtol=1e-5, atol=1e-6)
    theirs = added(lambda half: of_verl(name, options, mode, *part(half)))
    apart = float((theirs - of_verl(name, options, mode, *batch)[0]).abs())
    assert apart > 1e-3 if surrogate.plans else apart < 1e-6


def test_what_verl_adds_and_leaves_out(batch):
    """verl's clip has a dual bound that no paper has, and its KL-Cov a coefficient of 0.1 where the code has 1."""
    new, old, credit, mask = batch
    plain = of_ours(Clip(0.2, 0.2), "token-mean", new + 2, old, credit, mask)[0]
    assert float((plain - of_verl("vanilla", {}, "token-mean", new + 2, old, credit, mask)[0]).abs()) > 0.1
    assert actor().policy_loss.ppo_kl_coef == 0.1 and KLCov().beta == 1.0
    assert actor().clip_ratio_c == 3.0 and Clip().dual is None


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if not carried(m.within(12)).in_channel])
def test_a_registered_loss_is_the_methods_loss(name, batch):
    """Through verl's registry and its aggregation, for every method that its signature carries."""
    new, old, credit, mask = batch
    method = METHODS[name].within(12)
    if name in ("gspo", "grpo_s", "grpo_s_geometric"):  # a sequence's ratio refuses credit that varies
        credit = credit[:, :1] * mask
    how = carried(method)
    config = actor(loss_scale_factor=how.loss_scale_factor)
    config.global_batch_info["loss_scale_factor"] = how.loss_scale_factor
    leaf, other = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss, _ = get_policy_loss_fn(how.loss_mode)(
        old_log_prob=old,
        log_prob=leaf,
        advantages=credit,
        response_mask=mask,
        loss_agg_mode=how.loss_agg_mode,
        config=config,
    )
    rows = torch.zeros(len(mask))
    rollouts = Rollouts(rows, rows.long(), mask)
    expected, _ = method.loss(logprob=other, old_logprob=old, credit=credit, rollouts=rollouts)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-8)
