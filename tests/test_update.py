"""The update vector against steps that torch's optimizers really make, its split, and the states that are refused."""

import math
from dataclasses import replace

import pytest
import torch

from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.optimizer import Moments, OptimizerState, Rule, match_state, read_optimizer, step_parts
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import at_rate, loss_coefficients, update_vector
from tokencredit.dynamics.vectors import cosine, dot, moved, norm, scaled, total
from tokencredit.methods import METHODS

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, fused=True),
    "adamw_amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd_nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.fixture(scope="module")
def checkpoint():
    """The shipped model in float64; it has no optimizer state of its own."""
    return open_checkpoint("reckon", dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(checkpoint):
    return draw(checkpoint, 6, 4, seed=3)


def trained(checkpoint, batch, optimizer, method, max_norm, steps):
    """{name: change} of the last of some real steps, the gradient through the model's own loss; the model ends where it
    began.
    """
    model, named = checkpoint.model, dict(checkpoint.model.named_parameters())
    trainable = [p for p in named.values() if p.requires_grad]
    start, state = {name: p.detach().clone() for name, p in named.items()}, None
    for step in range(steps):
        if step == steps - 1:
            state, before = optimizer.state_dict(), {name: p.detach().clone() for name, p in named.items()}
            moments = {
                k: {n: torch.as_tensor(x).clone() for n, x in v.items() if x is not None}
                for k, v in state["state"].items()
            }
            state = {"param_groups": state["param_groups"], "state": moments}
            here = draw_again(checkpoint, batch)
        ids, mask, place = tokens(batch)
        logits = model(input_ids=ids, attention_mask=mask).logits
        logprob = torch.zeros(batch.rollouts.mask.shape, dtype=logits.dtype)
        logprob[place[0], place[2]] = logits.log_softmax(-1)[place[0], place[1] - 1, ids[place[0], place[1]]]
        credit = method.credit(batch.rollouts)
        optimizer.zero_grad()
        method.loss(logprob=logprob, old_logprob=logprob.detach(), credit=credit, rollouts=batch.rollouts)[0].backward()
        torch.nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
        optimizer.step()
    change = {name: (p.detach() - before[name]) for name, p in named.items() if p.requires_grad}
    at_last = {name: before[name] - start[name] for name in named}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(start[name])
    return change, state, at_last, here


def draw_again(checkpoint, batch):
    """The same rollouts, scored by the policy as it is now."""
    logprob, entropy = batch.passes(checkpoint).values()
    return replace(batch, rollouts=replace(batch.rollouts, scores={"logprob": logprob, "entropy": entropy}))


def tokens(batch):
    """(ids, attention, (row, position, index in the completion) of every completion token), by hand."""
    width = max(len(p) + len(c) for p, c in zip(batch.prompts, batch.completions))
    ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    row, position, index = [], [], []
    for i, (p, c) in enumerate(zip(batch.prompts, batch.completions)):
        ids[i, : len(p) + len(c)], mask[i, : len(p) + len(c)] = torch.tensor([*p, *c]), 1
        row += [i] * len(c)
        position += range(len(p), len(p) + len(c))
        index += range(len(c))
    return ids, mask, tuple(map(torch.tensor, (row, position, index)))


def trainer_groups(model):
    """As transformers' Trainer groups parameters: matrices and embeddings with weight decay, norms without."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if "norm" not in n]},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("max_norm", (None, 0.01))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_vector_is_the_step_that_the_optimizer_makes(checkpoint, batch, name, max_norm):
    """The third step, so that there is momentum; with clipping, and without."""
    method = METHODS["grpo"]
    optimizer = OPTIMIZERS[name](trainer_groups(checkpoint.model))
    real, state, offset, here = trained(checkpoint, batch, optimizer, method, max_norm, 3)
    at = replace(checkpoint, optimizer=match_state(state, checkpoint.model), max_grad_norm=max_norm)
    with moved(dict(checkpoint.model.named_parameters()), offset):
        update = update_vector(at, here, method)
    assert (update.clip < 1) == (max_norm is not None)
    assert 1 - cosine(update.vector, real) < 1e-6
    assert abs(norm(update.vector) / norm(real) - 1) < 1e-5


def test_a_wrong_bias_correction_would_be_seen(checkpoint, batch):
    """The check above can fail: one step more in AdamW's bias correction, and the length is off."""
    optimizer = OPTIMIZERS["adamw"](trainer_groups(checkpoint.model))
    real, state, offset, here = trained(checkpoint, batch, optimizer, METHODS["grpo"], None, 3)
    for moments in state["state"].values():
        moments["step"] = moments["step"] + 1
    at = replace(checkpoint, optimizer=match_state(state, checkpoint.model), max_grad_norm=None)
    with moved(dict(checkpoint.model.named_parameters()), offset):
        assert abs(norm(update_vector(at, here, METHODS["grpo"]).vector) / norm(real) - 1) > 1e-2


def test_lora_parameters_alone(checkpoint, batch):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        open_checkpoint("reckon", dtype=torch.float64).model, LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    lora = replace(checkpoint, policy=replace(checkpoint.policy, model=model.double().eval()))
    here = draw(lora, 6, 4, seed=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    real, state, offset, scored = trained(lora, here, optimizer, METHODS["grpo"], 0.05, 3)
    with moved(dict(model.named_parameters()), offset):
        update = update_vector(
            replace(lora, optimizer=match_state(state, model), max_grad_norm=0.05), scored, METHODS["grpo"]
        )
    assert all("lora_" in name for name in update.vector)
    assert 1 - cosine(update.vector, real) < 1e-6 and abs(norm(update.vector) / norm(real) - 1) < 1e-5


@pytest.fixture(scope="module")
def update(checkpoint, batch):
    torch.manual_seed(0)
    rule = Rule("adamw", lr=1e-3, weight_decay=0.1)
    names = {name: p for name, p in checkpoint.model.named_parameters()}
    moments = {n: Moments(7, 1e-3 * torch.randn_like(p), 1e-5 * torch.rand_like(p)) for n, p in names.items()}
    state = OptimizerState(dict.fromkeys(names, rule), moments)
    return update_vector(replace(checkpoint, optimizer=state, max_grad_norm=0.01), batch, METHODS["gtpo"])


def test_the_split_is_exact(update):
    """Momentum, decay and one term per rollout; and one term per token of a rollout."""
    rollouts = [update.of_rollout(i) for i in range(len(update.batch))]
    whole = total(update.momentum, update.decay, *rollouts)
    assert norm(total(whole, scaled(update.vector, -1))) < 1e-9 * norm(update.vector)
    assert norm(update.momentum) > 0 and norm(update.decay) > 0 and update.clip < 1
    row = int(update.coefficient.abs().sum(1).argmax())
    each = []
    for t in range(int(update.batch.rollouts.length[row])):
        weight = torch.zeros_like(update.coefficient)
        weight[row, t] = 1
        each.append(update.of_tokens(weight))
    assert norm(total(*each, scaled(rollouts[row], -1))) < 1e-6 * norm(
        rollouts[row]
    )  # the model computes its norms in float32


def test_shares_along_a_direction(update):
    """Forward mode gives every token's part at once; reverse mode gives it token by token, and they add up."""
    direction = update.passes.reverse(None, update.batch.rollouts.mask.double())
    shares = update.shares(direction)
    assert float(shares.sum()) == pytest.approx(dot(direction, update.fresh), rel=1e-5)
    assert sum(update.rest(direction).values()) + float(shares.sum()) == pytest.approx(
        dot(direction, update.vector), rel=1e-5
    )
    row = int(shares.abs().sum(1).argmax())
    assert float(shares[row].sum()) == pytest.approx(dot(direction, update.of_rollout(row)), rel=1e-4)


def test_every_part_is_proportional_to_the_rate(checkpoint, batch, update):
    names = list(update.gain)
    rule = Rule("adamw", lr=1e-3, weight_decay=0.1)
    state = OptimizerState.fresh(names, rule)
    one = update_vector(replace(checkpoint, optimizer=state), batch, METHODS["gtpo"])
    ten = update_vector(replace(checkpoint, optimizer=state.at(1e-2)), batch, METHODS["gtpo"])
    changed = at_rate(one, state, 1e-2)
    assert norm(total(ten.vector, scaled(changed.vector, -1))) < 1e-12 * norm(ten.vector) and changed.lr == 1e-2
    assert norm(one.momentum) == 0


def test_forward_mode_is_the_derivative(checkpoint, batch, update):
    """Central differences of log-probs and entropies along the step, in float64 as far as the model's float32 norms
    allow.
    """
    passes, eps = update.passes, 0.5
    d_logprob, d_entropy = passes.forward(update.vector)
    with moved(passes.parameters, update.vector, eps):
        ahead = passes.values()
    with moved(passes.parameters, update.vector, -eps):
        behind = passes.values()
    for tangent, up, down in zip((d_logprob, d_entropy), ahead, behind):
        slope = (up - down) / (2 * eps)
        assert float((slope - tangent).norm() / tangent.norm()) < 5e-3
    assert torch.equal(passes.values()[0], batch.passes(checkpoint).values()[0])


def test_reverse_is_the_transpose_of_forward(update):
    generator = torch.Generator().manual_seed(0)
    u = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in update.passes.parameters.items()
    }
    w, e = (torch.randn(update.coefficient.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    d_logprob, d_entropy = update.passes.forward(u)
    assert dot(update.passes.reverse(w, e), u) == pytest.approx(float((w * d_logprob + e * d_entropy).sum()), rel=1e-5)


def test_padding_and_order_do_not_matter(checkpoint, batch):
    passes = batch.passes(checkpoint)
    alone = [Passes(checkpoint.model, [p], [c]) for p, c in zip(batch.prompts, batch.completions)]
    for row, one in enumerate(alone):
        size = len(batch.completions[row])
        for x, y in zip(passes.values(), one.values()):
            assert torch.allclose(x[row, :size], y[0], atol=1e-6) and not x[row, size:].any()


def test_dynamic_sampling_keeps_groups_with_both_outcomes(checkpoint, batch):
    some = replace(batch, rollouts=replace(batch.rollouts, reward=(torch.arange(len(batch)) == 5).double()))
    update = update_vector(checkpoint.fresh("sgd"), some, METHODS["dapo"])
    assert len(update.batch) == 4 and set(update.batch.rollouts.group.tolist()) == {1}
    none = replace(batch, rollouts=replace(batch.rollouts, reward=torch.zeros(len(batch))))
    with pytest.raises(ValueError, match="both outcomes"):
        update_vector(checkpoint.fresh("sgd"), none, METHODS["dapo"])
    with pytest.raises(ValueError, match="Draw more prompts"):
        update_vector(checkpoint.fresh("sgd"), none, METHODS["grpo"])


def test_kl_cov_is_grpo_where_the_policy_has_not_moved(batch):
    """Its penalty's gradient is 0 at ratio 1, as is said of it."""
    plain = replace(METHODS["kl_cov"], surrogate=METHODS["grpo"].surrogate)
    assert torch.equal(loss_coefficients(METHODS["kl_cov"], batch)[0], loss_coefficients(plain, batch)[0])


def test_no_state_is_said_with_what_to_do(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--optimizer adamw"):
        checkpoint.needs_optimizer()
    with pytest.raises(FileNotFoundError, match="fresh optimizer"):
        read_optimizer(tmp_path, checkpoint.model)


@pytest.mark.parametrize(
    ("groups", "state", "told"),
    [
        ({"lr": 1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0}, {"state1": torch.zeros(1)}, "8-bit"),
        ({"lr": 1, "weight_decay": 0}, {"exp_avg_sq_row": torch.zeros(1)}, "Adafactor"),
        ({"lr": 1, "rho": 0.9}, {}, "groups have lr, rho"),
        ({"lr": 1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.1}, {}, "AdamW's or Adam's"),
    ],
)
def test_other_optimizers_are_refused_by_name(checkpoint, groups, state, told):
    params = list(range(sum(1 for _ in checkpoint.model.parameters())))
    with pytest.raises(ValueError, match=told):
        match_state(
            {"param_groups": [groups | {"params": params}], "state": dict.fromkeys(params, state)}, checkpoint.model
        )


def test_a_state_of_other_parameters_is_refused(checkpoint):
    other = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"2 of them, the model 20 .*does not have: \(2,\), \(2, 3\)"):
        match_state(optimizer.state_dict(), checkpoint.model)


def test_nothing_but_tensors_is_unpickled(checkpoint, tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"state": Surprise(), "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="can be read safely"):
        read_optimizer(tmp_path, checkpoint.model)


def test_one_step_by_hand():
    """AdamW, t = 1: m′ = .1 g, v′ = .001 g², both bias-corrected to g and g², so the step is −η sign(g) − η λ θ up to
    ε.
    """
    parts = step_parts(
        torch.tensor([2.0]), torch.tensor([-0.5]), Rule("adamw", lr=0.1, eps=0.0, weight_decay=0.1), Moments()
    )
    assert (
        float(parts.gain * -0.5) == pytest.approx(-0.1)
        and float(parts.decay) == pytest.approx(-0.02)
        and float(parts.momentum) == 0
    )


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        open_checkpoint("reckon", 40)
    with pytest.raises(ValueError, match="no field colour"):
        open_checkpoint("reckon", colour=1)


def test_the_vector_leads_from_one_checkpoint_to_the_next(tmp_path):
    """End to end: from a run's checkpoint and the rollouts that it drew next to the checkpoint that TRL saved after its
    step.
    """
    from tokencredit.dynamics.batch import Batch
    from tokencredit.engines.train import train
    from tokencredit.lm.prompts import encode_prompt
    from tokencredit.rollouts import Rollouts
    from tokencredit.train_config import TrainConfig

    own = {
        "steps": 3,
        "prompts": 8,
        "group": 4,
        "updates": 1,
        "save_every": 1,
        "eval_every": 0,
        "record_every": 1,
        "record_rows": 32,
    }
    run = train(
        TrainConfig(method="gtpo", threads=1, trl={"weight_decay": 0.1, "max_grad_norm": 0.05}, **own), tmp_path / "run"
    )
    before, after = (open_checkpoint(run.path, step) for step in (2, 3))
    rows = run.tokens(2)
    prompts = [encode_prompt(before.tokenizer, row["prompt"], chat=None) for row in rows]
    passes = Passes(before.model, prompts, [row["token_ids"] for row in rows])
    logprob, entropy = passes.values()
    rollouts = Rollouts(
        reward=torch.tensor([row["reward"] for row in rows]),
        group=torch.tensor([row["group"] for row in rows]),
        mask=passes.grid(torch.ones(len(passes.batch))) > 0,
        scores={"logprob": logprob, "entropy": entropy},
    )
    batch = Batch(
        rows, prompts, [tuple(row["token_ids"]) for row in rows], [False] * len(rows), [""] * len(rows), rollouts
    )
    update = update_vector(before, batch)
    named = dict(before.model.named_parameters())
    real = {name: p.detach().double() - named[name].detach().double() for name, p in after.model.named_parameters()}
    assert before.max_grad_norm == 0.05 and update.clip < 1 and norm(update.decay) > 0
    assert 1 - cosine(update.vector, real) < 1e-6 and abs(norm(update.vector) / norm(real) - 1) < 1e-5
