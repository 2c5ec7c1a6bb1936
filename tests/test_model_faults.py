"""What a model can do that would make per-token numbers wrong without a word: each is right, or refused by name."""

import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from architectures import VOCAB, tiny
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_scoring import checked_scoring
from tokencredit.lm import importance
from tokencredit.lm.decisions import Decisions
from tokencredit.lm.directions import Directions, select_parameters
from tokencredit.lm.exact import gradient_norms2
from tokencredit.lm.readout import find_readout, sequences
from tokencredit.lm.sketch import sketch
from trl_tiny import build

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def small(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return cls(LlamaConfig(**SMALL | options)).eval()


def batch(rows=3, length=20, vocabulary=VOCAB):
    ids = torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), (torch.arange(length) >= 4).long().expand(rows, -1)


# Decisions --------------------------------------------------------------------------------------------------------


def decided(x):
    """A function of x that is smooth but for what it decides."""
    top = x.topk(2).values.sum() + x.sort(descending=True).values[0] ** 2
    largest, at = x.max(0)
    chosen = torch.where(x > 0.5, x**2, -x).sum() + x[x.argmax()] * largest + x[at]
    return top + chosen + (x.round() * x).sum() + x.detach().sum() * x.sum() + float(x[0].detach()) * x[1]


def test_decisions_taken_as_given_leave_the_derivative_of_autograd():
    """At a step across every border, the difference along one coordinate is the gradient plus the curvature of the
    smooth part; without holding decisions it is not.
    """
    x = torch.tensor([0.49, 0.45, 0.52, 0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(decided(x), x)
    made, step = Decisions(), torch.tensor([0.2, 0.3, -0.4, 0.9], dtype=torch.float64)

    @torch.no_grad()
    def change(size, given):
        with made.given() if given else contextlib.nullcontext():
            ahead, behind = decided(x + size * step), decided(x - size * step)
        return float(ahead - behind) / (2 * size)

    with torch.no_grad(), made.recorded():
        first, second = decided(x), decided(x)
    assert first == second and made.routed
    # Everything is at most quadratic once the decisions are held, so a central difference of any size is exact.
    assert change(1.0, True) == pytest.approx(float(gradient @ step), rel=1e-12)
    assert abs(change(1.0, False) - float(gradient @ step)) > 0.1


def test_another_path_is_refused():
    made, x = Decisions(), torch.randn(4)
    with torch.no_grad():
        with made.recorded():
            x.topk(2)
        with made.given(), pytest.raises(ValueError, match=r"takes another path .*use method='jvp' or 'exact'"):
            x.argmax()


@pytest.mark.parametrize("name", ["olmoe", "phimoe"])
def test_a_step_across_a_routing_border_does_not_count(name, monkeypatch):
    """4 experts, top 2: with routings free to change the squared norm of a token came out 1,771 times too large (with
    300 directions), at a reported relative error of 0.003. Held, 60 directions are within 5 √(2/60) of the exact norms;
    free, the jump is seen.
    """
    rows, net = sequences(*batch()), tiny(name)
    parts = find_readout(net, rows.ids[0]), select_parameters(net), rows
    draw = lambda: sketch(*parts, num_directions=60, seed=1, method="finite_difference", tokens=4096)  # noqa: E731
    ratio = draw().norm2().mean(0) / gradient_norms2(*parts)
    assert ratio.max() < 1.9 and ratio.min() > 0.3
    monkeypatch.setattr(Decisions, "given", lambda self: contextlib.nullcontext())
    with pytest.raises(ValueError, match=r"is not smooth where finite differences .*use method='jvp' or 'exact'"):
        draw()


def test_experts_whose_routing_is_not_seen_are_refused():
    net = small()
    net.config.num_experts = 4
    masks = batch(vocabulary=40)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM is a mixture of 4 experts, and its routing .* was not seen"
    ):
        importance(net, *masks, method="finite_difference")
    assert importance(net, *masks, kinds=("gradient_norm",), method="sketch")["gradient_norm"].method == "jvp"


# Heads ------------------------------------------------------------------------------------------------------------


class Capped(LlamaForCausalLM):
    """A soft-cap of 30 that the config does not name."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = torch.tanh(out.logits / 30) * 30
        return out


def test_a_small_bend_of_the_logits_shows_in_half_precision():
    """It moves log-probs by some hundredths of a nat, as roundings of bfloat16 do."""
    nets, ids = [small(cls).bfloat16() for cls in (Capped, LlamaForCausalLM)], batch(vocabulary=40)[0][0]
    for net in nets:
        net.lm_head.weight.data.mul_(2)
    capped, plain = (net(input_ids=ids[None]).logits.float().log_softmax(-1) for net in nets)
    assert 0.01 < (capped - plain).abs().max() < 0.5
    readout = find_readout(nets[0], ids)
    assert readout.whole and "nor these after a scale and soft-cap that its config names" in readout.why
    assert not find_readout(nets[1], ids).whole
    with pytest.raises(ValueError, match="Capped has no head_norm: its logits are not the LM head's outputs"):
        importance(nets[0], *batch(vocabulary=40), kinds=("head_norm",))


class Peeking(LlamaForCausalLM):
    """Every token sees the mean of the whole row."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits + out.logits.mean(1, keepdim=True)
        return out


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match=r"Peeking gives other distributions .* it is not causal"):
        importance(small(Peeking), *batch(vocabulary=40), kinds=("entropy",))


def test_a_scaled_embedding_that_is_tied_moves_with_the_head():
    """A weight held by a layer that hooks know and by one that they do not moves in both."""
    net, rows = tiny("minicpm3").double(), sequences(*batch())
    readout, coverage = find_readout(net, rows.ids[0]), select_parameters(net)
    found = sketch(readout, coverage, rows, num_directions=1, seed=0, method="jvp", tokens=4096).tangents.logprob[0]
    u = Directions(coverage, 1, 0).dense(0)
    chosen = net(input_ids=rows.ids).logits.log_softmax(-1)[rows.row, rows.position, rows.target][:3]
    for value, tangent in zip(chosen, found):
        grads = torch.autograd.grad(value, list(coverage.named.values()), retain_graph=True)
        assert float(tangent) == pytest.approx(float(sum((g * u[n]).sum() for g, n in zip(grads, u))), rel=1e-4)


# The last block ---------------------------------------------------------------------------------------------------


def test_rows_as_long_as_there_are_heads():
    """[B, heads, L, D] and [B, L, heads, D] look the same then; one more column of padding tells them apart."""
    net, (ids, there, _) = tiny("gemma3"), batch(length=8)
    short = importance(net, ids[:, :4], there[:, :4], there[:, :4] * (torch.arange(4) > 0), ("last_block_norm",))
    longer = importance(net, ids, there, there * (torch.arange(8) > 0), ("last_block_norm",))
    torch.testing.assert_close(
        short["last_block_norm"].value, longer["last_block_norm"].value[:, :4], rtol=1e-4, atol=1e-5
    )


class Squared(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight**2)


def test_a_layer_that_is_not_linear_is_named():
    net = small()
    net.model.layers[1].mlp.up_proj = Squared(16, 24, bias=False)
    with pytest.raises(ValueError, match=r"its layer model\.layers\.1\.mlp\.up_proj \(Squared\)"):
        importance(net, *batch(vocabulary=40), kinds=("last_block_norm",))


# Training ---------------------------------------------------------------------------------------------------------


def test_a_model_that_no_scoring_gives_is_refused(tmp_path):
    trainer = build(CreditTrainer, tmp_path, method="grpo", model=small(Peeking, vocab_size=14))
    with pytest.raises(ValueError, match=r"entropies of Peeking are .* nats in the mean .* cannot be trained here"):
        trainer.train()


def test_rollouts_are_sampled_and_scored_without_dropout(tmp_path, monkeypatch):
    seen = []

    def single_turn(self, prompt_ids, *args, **kwargs):
        seen.append([m.training for m in self.model.modules() if isinstance(m, torch.nn.Dropout)])
        return [[3, 4, 1] for _ in prompt_ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", single_turn)
    trainer = build(CreditTrainer, tmp_path, {"max_steps": 1}, method="gtpo", model=tiny("gpt2", vocab_size=14))
    with pytest.warns(UserWarning) as said:
        trainer.train()
    told = " ".join(str(w.message) for w in said)
    assert "dropout moves the log-probs" in told and "Rows are moved to the left" in told
    assert seen and not any(map(any, seen)) and all(m.training for m in trainer.model.modules())


def test_dropout_of_adapters_is_told(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer = build(CreditTrainer, tmp_path, method="gtpo", model=get_peft_model(small(vocab_size=14), config))
    trainer.model.train()
    with pytest.warns(
        UserWarning, match="dropout moves .*set GRPOConfig\\(disable_dropout=True\\), and lora_dropout=0"
    ):
        checked_scoring(trainer)
