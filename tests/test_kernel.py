"""The Fisher kernel against one backward pass per token, real AdamW steps, and statistics written as loops."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tokencredit.dynamics import gradient_matrix, vectors
from tokencredit.dynamics import kernel as kernel_module
from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.influence import over_prompts, r2, real_changes, slope
from tokencredit.dynamics.kernel import (
    Features,
    Preconditioner,
    contributions,
    cosines,
    identity,
    kernel,
    of_state,
    of_update,
    sequence_features,
    token_features,
)
from tokencredit.dynamics.kernel_pairs import Units, effective_rank, pair_table, spectrum, top_share
from tokencredit.dynamics.kernel_shares import RANGES, SharedChange, share_figures
from tokencredit.dynamics.kernel_sketch import sketched_features, without_noise
from tokencredit.dynamics.optimizer import OptimizerState, Rule, match_state
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import at_rate, step_along
from tokencredit.dynamics.vectors import FiledMatrix
from tokencredit.lm.policy import Policy
from tokencredit.rollouts import Rollouts
from tokencredit.tasks.given import Given
from tokencredit.train_config import TrainConfig

V = 11
LENGTHS = (4, 2, 5, 3, 4, 1)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config).double().eval()


def rows(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda num: torch.randint(1, V, (num,), generator=generator).tolist()  # noqa: E731
    return [draw(2 + i % 2) for i in range(len(lengths))], [tuple(draw(length)) for length in lengths]


def random_metric(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Preconditioner(
        {n: torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1 for n, p in named.items()}, 1.0
    )


def slow_gradients(model, prompts, completions, scale):
    """[N, P]: P^-½ ∇log π of every token, one backward pass each, flattened in the order of the parameters."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for prompt, completion in zip(prompts, completions):
        for t in range(len(completion)):
            logits = model(input_ids=torch.tensor([[*prompt, *completion[: t + 1]]])).logits[0, len(prompt) + t - 1]
            grads = torch.autograd.grad(logits.log_softmax(0)[completion[t]], list(named.values()))
            found.append(torch.cat([(g * scale[n].sqrt()).flatten() for n, g in zip(named, grads)]))
    return torch.stack(found)


@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def passes(model):
    return Passes(model, *rows())


@pytest.fixture(scope="module")
def metric(model):
    return random_metric(model)


@pytest.fixture(scope="module")
def truth(model, metric):
    """[N, N]: the kernel of all tokens, slowly."""
    gradients = slow_gradients(model, *rows(), metric.inverse)
    return gradients @ gradients.T


def test_the_kernel_of_tokens_is_that_of_their_gradients(passes, metric, truth):
    features = token_features(passes, metric)
    k = kernel(features)
    assert torch.allclose(k, truth, rtol=1e-9, atol=1e-12) and len(k) == sum(LENGTHS)
    assert features.row.tolist() == [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    assert features.position.tolist() == [t for length in LENGTHS for t in range(length)]
    assert torch.equal(k, k.T) and float(torch.linalg.eigvalsh(k)[0]) > -1e-9 * float(k.diagonal().sum())


def test_some_tokens_alone(passes, metric, truth):
    where = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    where[0, 1:], where[2, 3], where[5] = True, True, True  # what is asked of padding is not there
    features = token_features(passes, metric, where)
    at = [1, 2, 3, 9, 18]
    assert list(zip(features.row.tolist(), features.position.tolist())) == [(0, 1), (0, 2), (0, 3), (2, 3), (5, 0)]
    assert torch.allclose(kernel(features), truth[at][:, at])
    assert torch.allclose(kernel(token_features(passes, metric), features), truth[:, at])


def test_the_kernel_of_completions_is_the_sum_over_their_tokens(passes, metric, truth):
    member = torch.zeros(sum(LENGTHS), len(LENGTHS), dtype=torch.float64)
    member[torch.arange(sum(LENGTHS)), torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length)])] = 1
    assert torch.allclose(kernel(sequence_features(passes, metric)), member.T @ truth @ member)
    weight = torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[3] = 0
    weighted = sequence_features(passes, metric, weight)
    flat = weight[passes.batch.row, torch.tensor([t for length in LENGTHS for t in range(length)])]
    keep = [0, 1, 2, 4, 5]
    assert weighted.row.tolist() == keep and (weighted.position == -1).all()
    expected = (member * flat[:, None]).T @ truth @ (member * flat[:, None])
    assert torch.allclose(kernel(weighted), expected[keep][:, keep])
    assert torch.allclose(kernel(token_features(passes, metric).by_row(flat)), expected)


@pytest.mark.parametrize("kind", (token_features, sequence_features))
def test_gradients_in_a_file_have_the_same_kernel(model, passes, metric, tmp_path, monkeypatch, kind):
    """To the last digit; of a large model, whose file holds bfloat16, to what its roundings leave. Blocks that do not
    divide the parameters, and several reads of the file.
    """
    known, heard = kind(passes, metric), []
    monkeypatch.setattr(kernel_module, "BLOCK", 100)
    monkeypatch.setattr(gradient_matrix, "READ", 19 * 250)
    filed = kind(passes, metric, limit=0, folder=tmp_path, heard=heard.append)
    assert isinstance(filed.matrix, FiledMatrix) and sum(heard) == len(filed) == len(known)
    assert torch.equal(filed.row, known.row) and torch.equal(filed.position, known.position)
    assert torch.equal(filed.matrix[:, :], known.matrix)
    assert torch.equal(kernel(filed), kernel(known)) and torch.equal(kernel(filed, known), kernel(known, known))
    assert not list(tmp_path.iterdir()), "the file has no name"
    monkeypatch.setattr(vectors, "FINE", 0)
    rough = kind(Passes(copy.deepcopy(model).float(), *rows()), metric, limit=0, folder=tmp_path)
    assert rough.matrix.dtype == torch.bfloat16
    assert torch.allclose(cosines(kernel(rough)), cosines(kernel(known)), atol=2e-3)
    assert torch.allclose(kernel(rough).diagonal(), kernel(known).diagonal(), rtol=1e-2)


def test_padding_and_order_do_not_matter(model, metric, truth):
    prompts, completions = rows()
    order = [3, 5, 0, 2, 4, 1]
    longer = Passes(
        model, [*(prompts[i] for i in order), [1, 2, 3]], [*(completions[i] for i in order), tuple([5] * 12)]
    )
    there = torch.tensor([[i < 6] * longer.width for i in range(7)])
    k = kernel(token_features(longer, metric, there))
    starts = np.cumsum([0, *LENGTHS])
    at = [int(starts[i]) + t for i in order for t in range(LENGTHS[i])]
    assert torch.allclose(k, truth[at][:, at])


def test_lora_parameters_alone():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    metric = random_metric(model)
    assert all("lora_" in name for name in metric.inverse)
    gradients = slow_gradients(model, *rows(), metric.inverse)
    features = token_features(Passes(model, *rows()), metric)
    assert features.matrix.shape == gradients.shape and torch.allclose(kernel(features), gradients @ gradients.T)


def test_a_cosine_is_one_with_itself_and_zero_where_there_is_no_gradient():
    features = Features(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]]), torch.arange(3), torch.zeros(3))
    assert torch.allclose(
        cosines(kernel(features)), torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]], dtype=torch.float64)
    )


# Sketches


DIRECTIONS = 768


@pytest.fixture(scope="module")
def phi(passes, metric):
    return sketched_features(passes, metric, DIRECTIONS, seed=1)


def test_a_sketch_is_right_on_average_and_as_noisy_as_stated(passes, metric, truth, phi):
    """The mean over K directions, in its stated standard errors: no entry of 190 is off by 4.5."""
    stated = ((truth.diagonal()[:, None] * truth.diagonal() + truth**2) / DIRECTIONS).sqrt()
    z = (kernel(phi) - truth) / stated
    assert float(z.abs().max()) < 4.5 and phi.noise == DIRECTIONS**-0.5
    each = phi.matrix[:, None] * phi.matrix[None] * DIRECTIONS
    assert torch.allclose(each.std(-1) / DIRECTIONS**0.5 / stated, torch.ones_like(truth), atol=0.3)
    assert torch.allclose(
        phi.matrix[:, :5] * DIRECTIONS**0.5, sketched_features(passes, metric, 5, seed=1).matrix * 5**0.5
    )


def test_the_norm_of_a_sketch_is_corrected(truth, phi):
    """Over 96 sketches of 8 directions the corrected norm is right on average; the plain one is not."""
    parts = phi.matrix.reshape(len(truth), DIRECTIONS // 8, 8) * (DIRECTIONS / 8) ** 0.5
    sketches = [x @ x.T for x in parts.unbind(1)]
    corrected = torch.tensor([float(without_noise(k.square().sum(), k.trace(), 8**-0.5)) for k in sketches])
    error = float(corrected.std()) / len(sketches) ** 0.5
    assert abs(float(corrected.mean()) - float((truth**2).sum())) < 4 * error
    plain = torch.tensor([float((k**2).sum()) for k in sketches])
    assert float(plain.mean()) - float((truth**2).sum()) > 4 * error


# Influence


def checkpoint_of(model, optimizer, max_grad_norm=None):
    return Checkpoint(Path("x"), 0, Policy(model, None, Given()), TrainConfig(), optimizer, max_grad_norm)


def batch_of(prompts, completions, model):
    passes = Passes(model, prompts, completions)
    mask = passes.grid(torch.ones(len(passes.batch))) > 0
    rollouts = Rollouts(reward=torch.zeros(len(prompts)), group=torch.arange(len(prompts)) // 2, mask=mask)
    return Batch([{}] * len(prompts), prompts, completions, [False] * len(prompts), [""] * len(prompts), rollouts)


def sum_of_logprobs(model, prompts, completions, weight):
    """Σ w log π through the model's own logits."""
    found = 0
    for prompt, completion, row in zip(prompts, completions, weight):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found = found + (logits[torch.arange(len(completion)), torch.tensor(completion)] * row[: len(completion)]).sum()
    return found


@pytest.fixture(scope="module")
def world():
    """A model after two real AdamW steps, the optimizer, its state, the update that the third would make, and held-out
    completions.
    """
    model = gpt2()
    prompts, completions = rows()
    weight = torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (sum_of_logprobs(model, prompts, completions, weight * (step + 1)) / 9).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    batch = batch_of(prompts, completions, model)
    state = match_state(optimizer.state_dict(), model)
    coefficient = weight * batch.rollouts.mask
    update = step_along(checkpoint_of(model, state, 0.5), batch, coefficient, -coefficient)
    held = Passes(model, *rows((5, 3, 6, 2, 4, 5, 3, 6), seed=9))
    return model, optimizer, state, update, held


def predicted(update, held, metric):
    """[N']: the part of the change that the batch makes, through the explicit kernel."""
    there = update.coefficient != 0
    k = kernel(token_features(held, metric), token_features(update.passes, metric, there))
    return contributions(k, update.coefficient[there], metric.fresh, update.clip).sum(1)


def test_the_kernel_predicts_what_the_forward_pass_does(world):
    _, _, state, update, held = world
    metric = of_update(update, state)
    fresh = held.forward(update.fresh)[0][held.place]
    assert update.clip < 1 and torch.allclose(predicted(update, held, metric), fresh, rtol=1e-9, atol=1e-13)
    whole = sequence_features(held, metric)
    sent = sequence_features(update.passes, metric, update.coefficient)
    by_row = contributions(
        kernel(whole, sent), torch.ones(len(sent), dtype=torch.float64), metric.fresh, update.clip
    ).sum(1)
    assert torch.allclose(by_row, held.forward(update.fresh)[0].sum(1), rtol=1e-9, atol=1e-13)


def real_step(world, lr):
    """[N']: how held-out log-probs change in a step that torch makes; the world is as it was after."""
    model, optimizer, _, update, held = world
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved = {k: {n: x.clone() for n, x in v.items()} for k, v in optimizer.state_dict()["state"].items()}
    own = torch.optim.AdamW(model.parameters())
    own.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in own.param_groups:
        group["lr"] = lr
    start = held.values()[0]
    own.zero_grad()
    sum_of_logprobs(model, update.batch.prompts, update.batch.completions, update.coefficient).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    own.step()
    change = (held.values()[0] - start)[held.place]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return change.numpy()


def test_influence_is_that_of_real_steps_and_three_mistakes_are_not(world):
    """torch's own AdamW at a thousandth of the rate; then P⁻², no bias correction in D, and f left out, each of which
    must fail.
    """
    _, optimizer, state, update, held = world
    metric, factor = of_update(update, state), 1e-3
    carried = (held.forward(update.momentum)[0] + held.forward(update.decay)[0])[held.place]
    real = real_step(world, 1e-2 * factor)

    def score(wrong):
        return r2(real, (factor * (predicted(update, held, wrong) + carried)).numpy())

    assert score(metric) > 0.9999
    assert slope(real, (factor * (predicted(update, held, metric) + carried)).numpy()) == pytest.approx(1, abs=1e-3)
    squared = Preconditioner({name: x**2 for name, x in metric.inverse.items()}, metric.fresh)
    rate = next(iter(state.rules.values()))
    t = next(iter(state.moments.values())).step + 1
    uncorrected = {
        n: 1 / ((1 / x - rate.eps) * (1 - rate.betas[1] ** t) ** 0.5 + rate.eps) for n, x in metric.inverse.items()
    }
    assert score(squared) < 0.9
    assert score(Preconditioner(uncorrected, metric.fresh)) < 0.9
    assert score(replace(metric, fresh=rate.lr)) < 0.9
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_small_steps_are_linear_and_large_ones_are_not(world):
    _, _, _, update, held = world
    named = {name: p.detach().clone() for name, p in held.parameters.items()}
    whole = held.forward(update.vector)[0][held.place].numpy()
    real = real_changes(held, update, (1e-3, 1e-1, 30.0))
    found = [r2(each[held.place].numpy(), factor * whole) for each, factor in zip(real, (1e-3, 1e-1, 30.0))]
    assert found[0] > 0.9999 and found[0] >= found[1] > found[2] and found[2] < 0.9
    assert all(torch.equal(p, named[name]) for name, p in held.parameters.items())


def test_r2_by_hand():
    """real 0, 2 (mean 1, spread 2), predicted 1, 2: 1 − 1/2; slope (0·1 + 2·2)/(1 + 4). A shifted or scaled prediction
    is not forgiven.
    """
    real, guess = np.array([0.0, 2.0]), np.array([1.0, 2.0])
    assert r2(real, guess) == pytest.approx(0.5) and slope(real, guess) == pytest.approx(0.8)
    assert r2(real, 3 * real) < 0 and np.isnan(r2(np.zeros(3), np.ones(3)))
    few = over_prompts(r2, real, guess, np.array([0, 1]))
    assert few.value == pytest.approx(0.5) and np.isnan(few.low)


# Preconditioners


def test_the_gain_is_f_times_the_inverse(world):
    _, _, state, update, _ = world
    metric, rule = of_update(update, state), next(iter(state.rules.values()))
    assert metric.fresh == pytest.approx(1e-2 * 0.1 / (1 - 0.9**3))
    for name, gain in update.gain.items():
        second = 0.99 * state.moments[name].second + 0.01 * (update.clip * update.gradient[name]) ** 2
        slow = 1 / ((second / (1 - 0.99**3)).sqrt() + rule.eps)
        assert torch.allclose(metric.inverse[name], slow, rtol=1e-9) and torch.allclose(
            metric.fresh * metric.inverse[name], gain
        )
    slower = of_update(at_rate(update, state, 1e-4), state)
    assert slower.fresh == pytest.approx(1e-2 * metric.fresh)
    assert all(torch.allclose(slower.inverse[name], x) for name, x in metric.inverse.items())


def test_the_state_without_a_batch(world):
    _, _, state, _, _ = world
    metric = of_state(state)
    name, moments = next(iter(state.moments.items()))
    assert torch.allclose(metric.inverse[name], 1 / ((moments.second.double() / (1 - 0.99**2)).sqrt() + 1e-8))
    assert metric.fresh == pytest.approx(1e-2 * 0.1 / (1 - 0.9**3))
    fresh = OptimizerState.fresh(list(state.rules), Rule("adamw", lr=1e-2))
    with pytest.raises(ValueError, match="no second moment"):
        of_state(fresh)


def test_sgd_is_the_identity_and_groups_may_differ(world):
    model, _, state, update, _ = world
    sgd = OptimizerState.fresh(list(state.rules), Rule("sgd", lr=0.3))
    plain = step_along(checkpoint_of(model, sgd), update.batch, update.coefficient, update.credit)
    metric = of_update(plain, sgd)
    assert metric.fresh == pytest.approx(0.3) and all(
        torch.allclose(x, torch.ones_like(x)) for x in metric.inverse.values()
    )
    slower = of_update(at_rate(plain, sgd, 0.1), sgd)
    assert slower.fresh == pytest.approx(0.1) and all(
        torch.allclose(x, torch.ones_like(x)) for x in slower.inverse.values()
    )
    assert identity(update.passes.parameters).inverse.keys() == metric.inverse.keys()
    one = next(iter(state.rules))
    mixed = OptimizerState(state.rules | {one: replace(state.rules[one], lr=1e-3, maximize=False)}, state.moments)
    both = step_along(checkpoint_of(model, mixed), update.batch, update.coefficient, update.credit)
    metric = of_update(both, mixed)
    assert metric.fresh == pytest.approx(1e-2 * 0.1 / (1 - 0.9**3))
    assert all(torch.allclose(metric.fresh * x, both.gain[name]) for name, x in metric.inverse.items())


def test_what_cannot_be_done_is_said_with_what_to_do(passes, metric, world):
    with pytest.raises(ValueError, match=r"19 tokens × 2,\d+ parameters are 0\.0 GiB .*a folder.*whole completions"):
        token_features(passes, metric, limit=1000)
    with pytest.raises(ValueError, match="6 completions"):
        sequence_features(passes, metric, limit=1000)
    with pytest.raises(ValueError, match="none of the tokens"):
        token_features(passes, metric, torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one direction"):
        sketched_features(passes, metric, 0)
    with pytest.raises(ValueError, match="positive and finite"):
        Preconditioner({"a": torch.tensor([1.0, -1.0])}, 1.0)
    with pytest.raises(ValueError, match="--optimizer adamw"):
        checkpoint_of(world[0], None).needs_optimizer()


# Statistics


@pytest.fixture(scope="module")
def units():
    """14 tokens of 7 completions of 4 prompts."""
    row = np.repeat(np.arange(7), 2)
    token = np.array([1, 2, 1, 1, 3, 2, 1, 2, 2, 3, 3, 1, 1, 2])
    return Units(row, np.tile([0, 1], 7), np.array([0, 0, 1, 1, 2, 2, 3])[row], {"token": token})


@pytest.fixture(scope="module")
def some_kernel():
    x = torch.randn(14, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x @ x.T


def subset(units, keep):
    return Units(
        units.row[keep], units.position[keep], units.prompt[keep], {name: x[keep] for name, x in units.labels.items()}
    )


def slow_pairs(k, units, scope, likeness):
    """Cosines of every pair of a kind, by two loops."""
    found = []
    for i in range(len(units)):
        for j in range(i):
            together, row = units.prompt[i] == units.prompt[j], units.row[i] == units.row[j]
            kind = "same completion" if row else "same prompt" if together else "other prompts"
            token, position = (
                units.labels["token"][i] == units.labels["token"][j],
                units.position[i] == units.position[j],
            )
            alike = {
                "all": True,
                "same token": token,
                "same position": position,
                "alike in none of these": not (token or position),
            }
            if kind == scope and alike[likeness]:
                found.append(float(k[i, j] / (k[i, i] * k[j, j]) ** 0.5))
    return np.array(found)


def student(left_out, level=0.95):
    """Half the jackknife's interval, from the formula."""
    from scipy.stats import t

    x = np.array(left_out)
    return t.ppf((1 + level) / 2, len(x) - 1) * ((len(x) - 1) / len(x) * np.square(x - x.mean()).sum()) ** 0.5


def test_pairs_are_counted_and_averaged_as_two_loops_do(some_kernel, units):
    table = pair_table(some_kernel, units)
    assert sum(each.num for each in table if each.likeness == "all") == 14 * 13 // 2
    for each in table:
        slow = slow_pairs(some_kernel, units, each.scope, each.likeness)
        assert each.num == len(slow) and each.cosine.value == pytest.approx(slow.mean())
        assert each.size.value == pytest.approx(np.abs(slow).mean()) and each.deviation.value == pytest.approx(
            slow.std()
        )
    across = next(each for each in table if (each.scope, each.likeness) == ("other prompts", "all"))
    keep = [np.flatnonzero(units.prompt != p) for p in range(4)]
    left_out = [slow_pairs(some_kernel[k][:, k], subset(units, k), "other prompts", "all").mean() for k in keep]
    assert across.cosine.high - across.cosine.value == pytest.approx(student(left_out))


def test_effective_rank_and_top_share(some_kernel, units):
    assert effective_rank(torch.eye(14, dtype=torch.float64), units).value == pytest.approx(14)
    assert effective_rank(torch.ones(14, 14, dtype=torch.float64), units).value == pytest.approx(1)
    values = torch.linalg.eigvalsh(some_kernel).numpy()
    rank, top = effective_rank(some_kernel, units), top_share(some_kernel, units)
    assert rank.value == pytest.approx(values.sum() ** 2 / (values**2).sum()) and top.value == pytest.approx(
        values[-1] / values.sum()
    )
    left_out = []
    for p in range(4):
        keep = np.flatnonzero(units.prompt != p)
        some = torch.linalg.eigvalsh(some_kernel[keep][:, keep]).numpy()
        left_out.append((some.sum() ** 2 / (some**2).sum(), some[-1] / some.sum()))
    assert rank.high - rank.value == pytest.approx(student([x for x, _ in left_out]))
    assert top.high - top.value == pytest.approx(student([x for _, x in left_out]))
    big = torch.randn(200, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert np.allclose(spectrum(big @ big.T, 5), torch.linalg.eigvalsh(big @ big.T).flip(0)[:5])


def test_parts_of_a_change_add_up_and_a_diagonal_kernel_has_one(units):
    c = torch.randn(14, 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = SharedChange.of(c, units)
    assert np.allclose(sum(change.parts.values()), c.sum(1)) and np.allclose(change.total, c.sum(1))
    i = 4
    others = [j for j in range(14) if units.prompt[j] != units.prompt[i]]
    assert change.parts["other prompts"][i] == pytest.approx(float(c[i, others].sum()))
    assert change.parts["same completion"][i] == pytest.approx(float(c[i, 5]))
    figures = share_figures(change, np.arange(14.0), np.linspace(0.01, 0.999, 14))
    assert sum(figures[f"share/{name}"].value for name in change.parts) == pytest.approx(1)
    assert sum(e.value for name, e in figures.items() if name.startswith("of_squared_change")) == pytest.approx(1)
    own = share_figures(
        SharedChange.of(torch.diag(torch.arange(1.0, 15, dtype=torch.float64)), units), np.arange(1.0, 15)
    )
    for name in (
        "share/own",
        "mass/own",
        "token/own",
        "sign/own",
        "correlation/own",
        "rank_correlation/own",
        "correlation/credit",
    ):
        assert own[name].value == pytest.approx(1) and own[name].high == pytest.approx(1)
    assert own["share/other prompts"].value == 0


def test_a_prompt_left_out_neither_receives_nor_sends(units):
    c = torch.randn(14, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    credit, probability = np.arange(14.0) % 5, np.linspace(0.01, 0.999, 14)
    figures = share_figures(SharedChange.of(c, units), credit, probability)
    left_out = []
    for p in range(4):
        keep = np.flatnonzero(units.prompt != p)
        left_out.append(
            share_figures(SharedChange.of(c[keep][:, keep], subset(units, keep)), credit[keep], probability[keep])
        )
    for name, figure in figures.items():
        values = [each[name].value for each in left_out]
        if np.isfinite([figure.value, *values]).all():
            low, high = RANGES[name.split("/")[0]]
            half = student(values)
            assert figure.high == pytest.approx(min(figure.value + half, high)), name
            assert figure.low == pytest.approx(max(figure.value - half, low)), name
        else:
            assert np.isnan(figure.low)


def test_whole_completions_have_no_share_of_their_own_other_tokens():
    units = Units(np.arange(4), np.full(4, -1), np.array([0, 0, 1, 1]), {"outcome": np.array([0, 1, 0, 1])})
    assert set(SharedChange.of(torch.eye(4, dtype=torch.float64), units).parts) == {
        "own",
        "same prompt",
        "other prompts",
    }
    kinds = {(each.scope, each.likeness) for each in pair_table(torch.eye(4, dtype=torch.float64), units)}
    assert ("other prompts", "same outcome") in kinds and not any(
        scope == "same completion" or "position" in like for scope, like in kinds
    )
