"""The TRL engine against stock TRL, and against itself: accumulated, reusing rollouts, without the rows that carry no
credit.
"""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from tokencredit import METHODS
from tokencredit.engines.trl import CreditTrainer
from tokencredit.objective import KLCov
from tokencredit.scores.table import UNMEASURED
from trl_tiny import LONGEST, VOCAB, FixedCredit, build, reward, steps, tiny_model, train, weights

TRL_EPS = 1e-4
# name -> (our method with TRL's conventions, TRL's own options for it)
PEERS = {
    "grpo": (METHODS["grpo"].replace(eps=TRL_EPS), {"loss_type": "grpo"}),
    "dr_grpo": (METHODS["dr_grpo"], {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (
        METHODS["dapo"].replace(eps=TRL_EPS, mixed_groups_only=False, max_length=1000, cache=1),
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "cispo": (METHODS["cispo"].replace(eps=TRL_EPS), {"loss_type": "cispo", "epsilon_high": 5.0}),
    "gspo": (
        METHODS["gspo"].replace(eps=TRL_EPS),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "sapo": (METHODS["sapo"].replace(eps=TRL_EPS), {"loss_type": "sapo"}),
}
REUSED = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 8, "learning_rate": 0.2}


def same_trajectory(stock, ours):
    """Losses and gradient norms of every step within 1e-5, with a floor where on-policy losses cancel to rounding; and
    the weights.
    """
    assert len(steps(stock)) == len(steps(ours)) > 0
    for a, b in zip(steps(stock), steps(ours)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5, abs=1e-6)
        assert b["reward"] == pytest.approx(a["reward"]) if "reward" in a else True
    start, end = weights_at_start(stock), weights(stock)
    assert (end - start).norm() > 1e-3 * start.norm()  # something was learned
    assert (weights(ours) - end).abs().max() < 1e-5 * end.abs().max()


def same_figures(stock, ours, name):
    """Every figure that stock TRL logs is logged under its name, with its value where it is no time and no figure of
    the loss, which `same_trajectory` compares.
    """
    for a, b in zip(steps(stock), steps(ours)):
        assert set(a) <= set(b), set(a) - set(b)
        compared = ("reward", "frac_reward", "completions/", "clip_ratio/", "cispo_clip")
        for figure in (each for each in a if each.startswith(compared)):
            by_sequence = name == "gspo" and figure.startswith("clip_ratio/")  # tokens are counted here
            assert by_sequence or b[figure] == pytest.approx(a[figure], rel=1e-4, abs=1e-6), figure


def weights_at_start(trainer):
    found = [p.detach().flatten().double() for p in tiny_model().parameters()]
    return torch.cat(found) if len(found) == len(list(trainer.model.parameters())) else torch.zeros(()).double()


@pytest.mark.parametrize("mode", ["on_policy", "reused"])
@pytest.mark.parametrize("name", PEERS)
def test_trajectory_is_stock_trls(tmp_path, name, mode):
    method, options = PEERS[name]
    changes = options | {"max_steps": 5} | (REUSED if mode == "reused" else {})
    stock, ours = train(GRPOTrainer, tmp_path, changes), train(CreditTrainer, tmp_path, changes, method=method)
    same_trajectory(stock, ours)
    same_figures(stock, ours, name)
    if mode == "reused" and "clip_ratio/low_mean" in steps(stock)[-1]:
        clipped = [[s[f"clip_ratio/{side}_mean"] for side in ("low", "high")] for s in steps(stock)]
        assert sum(map(sum, clipped)) > 0  # the clip was at work
        if name != "gspo":  # TRL averages a sequence ratio's clips over sequences, not tokens
            assert [[s["clip_low"], s["clip_high"]] for s in steps(ours)] == [
                pytest.approx(c, abs=1e-6) for c in clipped
            ]


@pytest.mark.filterwarnings("ignore:no token has credit under .*no token that counts")  # all are truncated
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "steps_per_generation": 4},
        {"mask_truncated_completions": True},
        {"scale_rewards": "batch"},
        {"temperature": 0.7},
        {"reward_weights": [1.0, 0.5]},
    ],
    ids=lambda changes: list(changes)[-1],
)
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_trls_options_mean_what_they_mean_there(tmp_path, name, changes):
    method, options = PEERS[name]
    method = method.replace(scale=changes.get("scale_rewards", "group"))
    changes, functions = options | {"max_steps": 4} | changes, reward
    if "reward_weights" in changes:
        functions = [
            reward,
            lambda completions, **_: [len(c) / 10 if i % 3 else None for i, c in enumerate(completions)],
        ]
    stock = train(GRPOTrainer, tmp_path, changes, reward_funcs=functions)
    same_trajectory(stock, train(CreditTrainer, tmp_path, changes, reward_funcs=functions, method=method))


@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize("mode", ["on_policy", "reused"])
def test_kl_to_the_reference_is_stock_trls(tmp_path, mode, corrected):
    tiny_model().save_pretrained(tmp_path / "model")
    method, options = PEERS["grpo"]
    changes = (
        options
        | {"beta": 0.5, "max_steps": 5, "use_bias_correction_kl": corrected}
        | (REUSED if mode == "reused" else {})
    )
    changes |= {"model_init_kwargs": {"dtype": "float32"}}
    stock = train(GRPOTrainer, tmp_path, changes, model=str(tmp_path / "model"))
    ours = train(CreditTrainer, tmp_path, changes, model=str(tmp_path / "model"), method=method)
    same_trajectory(stock, ours)
    assert steps(ours)[-1]["kl"] == pytest.approx(steps(stock)[-1]["kl"], rel=1e-4) and steps(ours)[-1]["kl"] > 0


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "dapo", "clip_cov", "kl_cov", "forking_tokens", "grpo_s", "gtpo", "rloo"]
)
def test_accumulated_gradient_is_the_gradient(tmp_path, name):
    """One batch of 8 or 8 batches of 1: the step of plain SGD, which is the gradient, is the same."""
    method = METHODS[name].replace(mixed_groups_only=False)
    if name == "clip_cov":
        method = method.replace(fraction=0.2, band=(0.0, 5.0))
    found = []
    for size, accumulated in ((8, 1), (1, 8)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer = train(FixedCredit, tmp_path, changes, method=method)
        found.append((weights(trainer) - weights_at_start(trainer), trainer.kept[0]))
    (whole, kept), (accumulated, kept_too) = found
    assert whole.norm() > 1e-4 and (whole - accumulated).abs().max() < 1e-5 * whole.abs().max()
    assert all(torch.allclose(kept[n], kept_too[n], atol=1e-6) for n in kept)
    assert name not in ("clip_cov", "kl_cov") or kept["coefficient"].sum() > 0


@dataclass(frozen=True)
class SmoothKLCov(KLCov):
    """KL-Cov with a squared penalty: that of |log ratio| has the sign of rounding at the first update on a batch."""

    def token_loss(self, logprob, old_logprob, credit, mask, coefficient):
        penalty = coefficient * (logprob - old_logprob).square()
        return -(logprob - old_logprob).exp() * credit + penalty, {}


SMOOTH = METHODS["kl_cov"].replace(name="smooth_kl_cov", surrogate=SmoothKLCov(fraction=0.3))


@pytest.mark.parametrize("method", [METHODS["grpo"], METHODS["gtpo"], SMOOTH], ids=lambda method: method.name)
def test_dropping_rows_without_credit_changes_nothing_but_time(tmp_path, method):
    class All(FixedCredit):
        def _credited_rows(self, inputs):
            return None

    changes = REUSED | {"max_steps": 8, "learning_rate": 0.05}
    seldom = lambda completions, **_: [float("3 3" in c) for c in completions]  # noqa: E731
    few, everything = (train(cls, tmp_path, changes, method=method, reward_funcs=seldom) for cls in (FixedCredit, All))
    # What is dropped has no credit, so the share of tokens with credit does not say whether it was.
    assert min(s["credited_share"] for s in steps(few)) < 0.9
    assert [s["credited_share"] for s in steps(few)] == pytest.approx([s["credited_share"] for s in steps(everything)])
    assert (weights(few) - weights(everything)).abs().max() < 1e-5
    for a, b in zip(steps(few), steps(everything)):
        for figure in ("loss", "entropy", "clip_low", "clip_high"):
            assert a.get(figure, 0.0) == pytest.approx(b.get(figure, 0.0), rel=1e-5, abs=1e-6)


def test_entropy_logged_is_that_of_all_rows_as_in_stock_trl(tmp_path):
    method, options = PEERS["grpo"]
    stock, ours = train(GRPOTrainer, tmp_path, options), train(CreditTrainer, tmp_path, options, method=method)
    assert steps(ours)[0]["credited_share"] < 1
    assert [s["entropy"] for s in steps(ours)] == pytest.approx([s["entropy"] for s in steps(stock)], rel=1e-5)


def test_four_updates_on_a_rollout_batch_move_the_ratios(tmp_path):
    changes = {
        "num_iterations": 4,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 16,
        "learning_rate": 0.3,
    }
    records = steps(train(CreditTrainer, tmp_path, changes, method="grpo"))
    assert len(records) == 16
    assert (
        records[0]["ratio_min"] == records[0]["ratio_max"] == 1
        and records[0]["clip_low"] + records[0]["clip_high"] == 0
    )
    assert all(s["kl_old"] > 0 for s in records[4:])
    assert max(s["ratio_max"] for s in records) > 1.1 and min(s["ratio_min"] for s in records) < 0.9
    assert sum(s["clip_low"] for s in records) > 0 and sum(s["clip_high"] for s in records) > 0
    on_policy = steps(train(CreditTrainer, tmp_path, {"max_steps": 4}, method="grpo"))
    assert all(s["ratio_min"] == s["ratio_max"] == 1 and s["kl_old"] == 0 for s in on_policy)


def entropy_by_hand(model, batch, row, temperature):
    """Entropy at every token of one recorded completion, from the logits of the unpadded sequence."""
    prompt = torch.tensor([VOCAB.index(word) for word in batch["prompts"][row].split()])
    ids = batch["completion_ids"][row][batch["mask"][row]]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].double() / temperature
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def check_entropies(trainer, batch):
    """The recorded entropies are the sampling policy's at the sampling temperature."""
    for row in range(len(batch["texts"])):
        expected = entropy_by_hand(trainer.model, batch, row, trainer.temperature)
        assert torch.allclose(batch["scores"]["entropy"][row][batch["mask"][row]].double(), expected, atol=1e-5)
    return expected


TRUTHS = ("exact_value", "oracle_positions", "step_gain", *UNMEASURED)


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "temperature": 0.7}], ids=["on_policy", "reused"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_the_old_policys_entropies(tmp_path, name, changes):
    seen = []
    trainer = build(
        CreditTrainer,
        tmp_path,
        {"max_steps": 3, "per_device_train_batch_size": 8} | changes,
        method=name,
        max_rounds=2,
        record_every=1,
        scorers=dict.fromkeys(TRUTHS, lambda trainer, inputs, batch: torch.rand(batch["completion_ids"].shape) - 0.5),
        record=lambda batch: seen.append(check_entropies(trainer, batch)),
    )
    trainer.train()
    assert len(seen) == (3 if not changes else 2)
    assert all(torch.isfinite(torch.tensor([s["loss"], s["grad_norm"]])).all() for s in steps(trainer))
    assert sum(s["grad_norm"] for s in steps(trainer)) > 0


@pytest.mark.parametrize("mode", ["on_policy", "reused"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_lora_takes_the_entropies_of_the_policy_not_of_the_reference(tmp_path, beta, mode):
    seen = []

    def record(batch):
        policy = check_entropies(trainer, batch)
        with trainer.model.disable_adapter():
            base = entropy_by_hand(trainer.model, batch, -1, 1.0)
        seen.append(float((policy - base).abs().max()))

    adapter = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    changes = {"beta": beta, "max_steps": 4} | (REUSED if mode == "reused" else {})
    trainer = build(CreditTrainer, tmp_path, changes, method="gtpo", peft_config=adapter, record=record, record_every=1)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert min(seen) > 1e-2
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora" in n for n in moved)
    assert beta == 0 or steps(trainer)[0]["kl"] > 0


@pytest.mark.parametrize("name", ["grpo", "gtpo", "clip_cov"])
def test_half_precision_and_checkpointed_activations(tmp_path, name):
    changes = REUSED | {"bf16": True, "gradient_checkpointing": True, "max_steps": 4, "learning_rate": 0.02}
    for more in (
        {},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "num_iterations": 1, "steps_per_generation": 1},
    ):
        records = steps(train(CreditTrainer, tmp_path, changes | more, method=name))
        assert all(0 < s["entropy"] < 3 and torch.isfinite(torch.tensor(s["grad_norm"])) for s in records)


def passes(monkeypatch, folder, changes, cls=CreditTrainer, **keywords):
    """Rows per rollout batch that went through the model: (without a gradient, with one), completions generated
    apart.
    """
    rows = {True: 0, False: 0}
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, model, ids, *args, **kwargs):
        # The comparison with the plain model at the start is not part of a batch.
        if getattr(self, "_scoring", True) is not None:
            rows[torch.is_grad_enabled()] += len(ids)
        return original(self, model, ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
        trainer = train(cls, folder, changes, **keywords)
    batches = changes["max_steps"] / changes.get("num_iterations", 1)
    share = sum(s.get("credited_share", 1) for s in steps(trainer)) / changes["max_steps"]
    return rows[False] / batches, rows[True] / batches, share


def test_forward_passes_are_no_more_than_needed(tmp_path, monkeypatch):
    once, twice = {"max_steps": 2}, {"max_steps": 4, "num_iterations": 2}
    differ = lambda completions, **_: [i % 4 / 4 for i in range(len(completions))]  # noqa: E731
    # No row is without credit: on-policy grpo forwards each row once, as stock TRL does.
    assert passes(monkeypatch, tmp_path, once, GRPOTrainer, reward_funcs=differ) == (0, 16, 1)
    assert passes(monkeypatch, tmp_path, once, method="grpo", reward_funcs=differ) == (0, 16, 1)
    # Entropy before the update is heard while transformers generates, once beside a pass; and TRL's own pass has it.
    assert passes(monkeypatch, tmp_path, once, method="entropy_advantage", reward_funcs=differ) == (16 / 2, 16, 1)
    assert passes(monkeypatch, tmp_path, twice, GRPOTrainer, reward_funcs=differ) == (16, 32, 1)
    assert passes(monkeypatch, tmp_path, twice, method="entropy_advantage", reward_funcs=differ) == (16, 32, 1)
    # Rows without credit leave the backward pass; where nobody has measured their entropy they are forwarded for it.
    plain, graded, share = passes(monkeypatch, tmp_path, once, method="grpo")
    assert share < 1 and 0 < plain == 16 - graded
    plain, graded, share = passes(monkeypatch, tmp_path, once, method="gtpo")
    assert share < 1 and plain == 16 / 2 and graded < 16


@pytest.mark.parametrize("shape", [(16, LONGEST), (16, 1)], ids=["token", "sequence"])
def test_vllms_importance_ratio_scales_the_gradient(tmp_path, shape):
    trainer = build(FixedCredit, tmp_path, method="grpo")
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.current_gradient_accumulation_steps = 1

    def gradient(**more):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, inputs | more).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone()

    plain = gradient()
    width = min(shape[1], inputs["completion_ids"].shape[1])
    assert (
        torch.allclose(gradient(importance_sampling_ratio=torch.full((16, width), 2.0)), 2 * plain, atol=1e-6)
        and plain.norm() > 0
    )


def test_what_credit_per_token_takes_to_keep(tmp_path):
    """A rollout batch that waits for its updates: credit and weight are 8 bytes for a token, where TRL's advantage is 4
    for a rollout; all else is the same (docs/training.md).
    """
    kept = {}

    def watched(cls):
        class Watched(cls):
            def _generate_and_score_completions(self, inputs):
                out = super()._generate_and_score_completions(inputs)
                kept[cls] = {name: x.numel() * x.element_size() for name, x in out.items() if torch.is_tensor(x)}
                kept[cls, "shape"] = list(out["completion_ids"].shape)
                return out

        return Watched

    changes = {"max_steps": 1, "num_iterations": 2}
    train(watched(GRPOTrainer), tmp_path, changes)
    train(watched(CreditTrainer), tmp_path, changes, method="gtpo")
    stock, credit = kept[GRPOTrainer], kept[CreditTrainer]
    rows, width = kept[CreditTrainer, "shape"]
    assert credit["advantages"] + credit["token_weight"] == 8 * rows * width and stock["advantages"] == 4 * rows
    assert kept[GRPOTrainer, "shape"] == [rows, width]
    assert credit.keys() - stock.keys() <= {"token_weight", "entropy_known"}
    for name in stock.keys() & credit.keys() - {"advantages"}:
        assert stock[name] == credit[name], name
