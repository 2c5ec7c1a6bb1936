"""Bias and variance of weighted gradients: against enumeration, autograd, subsets counted one by one, rollouts drawn
from known laws.
"""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from tokencredit import limits
from tokencredit.cli import main
from tokencredit.dynamics import gradient_matrix, vectors
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.update import loss_coefficients
from tokencredit.dynamics.vectors import FiledMatrix
from tokencredit.methods import METHODS
from tokencredit.studies.variance.estimators import (
    GradientMoments,
    exact_figures_of,
    figures_of,
    inverse,
    p_value,
    statistics_of,
)
from tokencredit.studies.variance.exact import ANSWERS, Law, World, measurable
from tokencredit.studies.variance.gradients import (
    Reference,
    exact_gradients,
    sketched_gradients,
    token_derivatives,
    weights_of,
)
from tokencredit.studies.variance.plan import EXACT, checkpoints
from tokencredit.studies.variance.question import STUDY, VarianceConfig
from tokencredit.studies.variance.sampling import SCHEMES, added_variance, drawn_check
from tokencredit.studies.variance.setting import SKETCH, directions_of
from tokencredit.tasks.exact import ExactWorld, PromptedPolicy
from tokencredit.tasks.verdict import Verdict


@pytest.fixture(scope="module")
def world():
    return World(group=3)


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("reckon")


@pytest.fixture(scope="module")
def batch(checkpoint):
    """Four prompts, twice three rollouts of each, with the scores that sampling reads."""
    return draw(checkpoint, 8, 3, seed=1, needs=("gradient_norm", "fisher_trace", "head_norm", "uniform"))


def test_the_truth_is_the_gradient_of_the_expected_reward(world):
    """Through the enumeration itself, which knows nothing of Q − V or of log-probabilities of tokens."""
    parameters = list(world.model.parameters())
    whole = 0
    for answer in ANSWERS:

        def reward(completions, answer=answer):
            if completions.shape[1] < 2:
                return torch.zeros(len(completions))
            return ((completions[:, -1] == 2) & (completions[:, -2] == answer)).double()

        grads = ExactWorld(3, 3, reward, 2).enumerate(PromptedPolicy(world.model, [answer])).policy_gradient(parameters)
        whole = whole + torch.cat([g.flatten() for g in grads]) / len(ANSWERS)
    # The model's norms are float32 whatever its weights are.
    assert (world.truth @ world.token_gradients - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("name", ("reinforce", "rloo", "dr_grpo", "exact_value"))
def test_unbiased_methods_have_no_angle_to_the_truth(world, name):
    base = world.estimator(METHODS["grpo"].within(64))
    moments = world.estimator(METHODS[name].within(64)).moments(base, world)
    figures = exact_figures_of(moments, base.moments(base, world), 64)
    assert abs(figures["truth_cosine"] - 1) < 1e-9
    if name == "rloo":
        # Σ over the rollouts of (r − mean of the others) Σₜ ∇log π, divided by their number, is ∇J without any factor.
        assert moments.signal[0] == pytest.approx(moments.truth[0], rel=1e-6)
        assert figures["mse_raw"] == pytest.approx(moments.noise[0] / moments.truth[0] / 64, rel=1e-6)


def test_length_normalisation_and_overweighting_turn_the_gradient(world):
    """The check above can fail: GRPO's 1/|o| and a proxy's weights do turn it."""
    base = world.estimator(METHODS["dapo"].within(64))
    for name in ("grpo", "ptw_attention"):
        moments = world.estimator(METHODS[name].within(64)).moments(base, world)
        assert exact_figures_of(moments, base.moments(base, world), 64)["truth_cosine"] < 0.99


def test_moments_of_groups_against_a_sum_over_ordered_groups(world):
    """GRPO with groups of 2, by its formula: credit ±1/√2 where rewards differ, divided by the length, every ordered
    pair.
    """
    small = World(group=2)
    found = small.estimator(METHODS["grpo"].within(64))
    moments = found.moments(found, small)
    gradients = small.token_gradients.unflatten(0, (2, 15, 3))
    mean, second, product = 0, 0.0, 0.0
    for p, prompt in enumerate(small.prompts):
        lengths, own = prompt.rollouts.length, 0
        for i, j in itertools.product(range(15), repeat=2):
            gap = float(prompt.rollouts.reward[i] - prompt.rollouts.reward[j])
            credit = gap / 2 / (abs(gap) / math.sqrt(2) + 1e-6)
            x = (credit * gradients[p, i].sum(0) / lengths[i] - credit * gradients[p, j].sum(0) / lengths[j]) / 2
            chance = float(prompt.probability[i] * prompt.probability[j])
            own, second = own + chance * x, second + chance * float(x @ x) / 2
        mean, product = mean + own / 2, product + float(own @ own) / 2
    assert moments.second[0] == pytest.approx(second, rel=1e-9)
    assert moments.signal[0] == pytest.approx(float(mean @ mean), rel=1e-9)
    assert moments.pair[0] == pytest.approx(product, rel=1e-9)


@pytest.fixture(scope="module")
def law(world):
    """The unweighted method, the one that is looked at, and the true one."""
    return Law.of(world, [METHODS[name].within(64) for name in ("grpo", "ptw_entropy", "rloo")])


def sampled(law, prompts, seed):
    return law.sample("ptw_entropy", "grpo", "rloo", prompts, seed)


@pytest.fixture(scope="module")
def resolved_law():
    """(world, law) of the first seed whose gradients 60 prompts tell apart: what it draws depends on the machine."""
    for seed in range(16):
        world = World(seed=seed, group=3)
        law = Law.of(world, [METHODS[name].within(64) for name in ("grpo", "ptw_entropy", "rloo")])
        few = [figures_of(*sampled(law, 60, draw), 64) for draw in range(12)]
        if not any(np.isnan(each[name].value) for each in few for name in COVERED):
            return world, law
    raise AssertionError("no world of sixteen is resolved by 60 prompts")


COVERED = ("cosine", "relative_variance", "mse", "ess_variance", "length")


def test_estimates_are_unbiased_and_intervals_cover(resolved_law):
    """250 samples of 60 prompts; a squared norm of the mean, which is not unbiased, misses by far more than 4 standard
    errors.
    """
    world, law = resolved_law
    base = world.estimator(METHODS["grpo"].within(64))
    exact = world.estimator(METHODS["ptw_entropy"].within(64)).moments(base, world)
    # The world's own truth is the mean of `rloo`, up to the factor that the test before finds to be 1.
    known = {
        name: float(getattr(exact, name)[0])
        for name in ("second", "signal", "pair", "with_base", "with_truth", "truth", "noise")
    }
    figures = exact_figures_of(exact, base.moments(base, world), 64)
    draws = [sampled(law, 60, seed) for seed in range(250)]
    for name, value in known.items():
        found = np.array([getattr(own, name)[0] for own, _ in draws])
        assert abs(found.mean() - value) < 4 * found.std(ddof=1) / math.sqrt(len(found)), name
    plug_in = np.array([own.signal[0] + own.noise[0] / 60 for own, _ in draws])
    assert plug_in.mean() - known["signal"] > 4 * plug_in.std(ddof=1) / math.sqrt(len(plug_in))
    found = [figures_of(own, base, 64) for own, base in draws]
    for name in COVERED:
        held = [each[name].low <= figures[name] <= each[name].high for each in found if not np.isnan(each[name].value)]
        assert len(held) > 200 and np.mean(held) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / len(held)), (name, np.mean(held))


def test_without_a_prompt_is_what_it_says(world):
    """The jackknife's arrays against moments of samples from which each prompt was really taken away."""
    generator = torch.Generator().manual_seed(2)
    x, base, truth = torch.randn(3, 12, 7, generator=generator, dtype=torch.float64) + 0.5
    counts = {"credited": np.arange(6.0), "tokens_apart": np.ones(6)}

    def moments(keep):
        rows = torch.cat([keep, keep + 6])
        reference = Reference(base[rows], truth[rows])
        some = {name: each[keep] for name, each in counts.items()}
        return GradientMoments.of(reference.products(x[rows]) | some, reference.products(truth[rows]) | some)

    whole = moments(torch.arange(6))
    for p in range(6):
        without = moments(torch.tensor([q for q in range(6) if q != p]))
        for name in ("second", "signal", "pair", "with_base", "with_truth", "truth", "credited", "noise"):
            assert getattr(whole, name)[1 + p] == pytest.approx(getattr(without, name)[0], rel=1e-9), name


def test_the_figures_mean_what_they_say(law):
    """Least error over lengths by search; effective sample size by putting it back; scale changes the length and
    nothing else.
    """
    (own, base), n = sampled(law, 200, seed=5), 16
    found = {name: x[0] for name, x in statistics_of(own, base, n).items()}
    scales = np.linspace(0, 20, 200_001)
    error = scales**2 * (own.signal[0] + own.noise[0] / n) - 2 * scales * own.with_truth[0] + own.truth[0]
    assert found["mse"] == pytest.approx(error.min() / own.truth[0], rel=1e-6)
    assert found["mse_raw"] == pytest.approx(error[np.abs(scales - 1).argmin()] / own.truth[0], rel=1e-6)
    unweighted = n / found["per_unweighted"]
    if unweighted > 0:
        assert statistics_of(base, base, unweighted)["mse"][0] == pytest.approx(found["mse"], rel=1e-6)
    itself = figures_of(base, base, n)
    assert [itself[name].value for name in ("cosine", "length", "ess", "ess_variance")] == pytest.approx([1, 1, 1, 1])
    assert itself["angle"].value == 0 and itself["ess"].high - itself["ess"].low < 1e-6
    doubled = replace(
        own,
        **{name: getattr(own, name) * 4 for name in ("second", "signal", "pair", "tokens_apart")},
        **{name: getattr(own, name) * 2 for name in ("with_base", "with_truth")},
    )
    scaled = {name: x[0] for name, x in statistics_of(doubled, base, n).items()}
    assert scaled.pop("length") == pytest.approx(2 * found.pop("length"))
    assert scaled.pop("mse_raw") != pytest.approx(found.pop("mse_raw"))
    assert scaled == pytest.approx(found)


def test_a_mean_that_may_be_zero_has_no_direction():
    """Pure noise: nothing that divides by its length is given."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(2, 40, 50, generator=generator, dtype=torch.float64)
    reference = Reference(truth + 1, truth + 1)
    counts = {"credited": np.ones(20), "tokens_apart": np.ones(20)}
    own, base = (
        GradientMoments.of(reference.products(each) | counts, reference.products(truth + 1) | counts)
        for each in (x, truth + 1)
    )
    found = figures_of(own, base, 8)
    assert all(
        np.isnan(found[name].value) for name in ("cosine", "truth_angle", "length", "ess", "mse", "efficiency_ratio")
    )
    assert np.isinf(found["relative_variance"].high)
    assert np.isfinite(figures_of(base, base, 8)["truth_cosine"].value)


def test_p_values_follow_the_interval():
    """At the edge of the 95 % interval p is 0.05; a statistic that cannot vary proves nothing."""
    values = np.concatenate([[1.3], 1.3 + 0.01 * np.random.default_rng(0).standard_normal(50)])
    from tokencredit.studies.variance.estimators import interval

    edge = interval(values).low
    assert p_value(values, edge) == pytest.approx(0.05, abs=1e-9)
    assert p_value(values, interval(values, log=True).low, log=True) == pytest.approx(0.05, abs=1e-6)
    assert p_value(np.full(9, 2.0), 1.0) == 1.0 == p_value(np.full(9, np.nan), 1.0)
    assert inverse(interval(np.concatenate([[-0.5], -0.5 + values[1:] - 1.3]))).value == np.inf


def test_group_gradients_add_up_to_the_batch_gradient(checkpoint, batch):
    """And sketches are the same gradients along the directions, number by number."""
    method = METHODS["gtpo"]
    weight = weights_of(method, batch.rollouts)
    x = exact_gradients(checkpoint, batch)(weight)
    whole = torch.cat([part.flatten() for part in batch.passes(checkpoint).reverse(-weight).values()])
    assert (x.double().mean(0) - whole).norm() < 1e-4 * whole.norm() > 0
    assert torch.equal(weight, loss_coefficients(method, batch)[0])
    parameters = dict(batch.passes(checkpoint).parameters)
    derivatives = token_derivatives(checkpoint, batch, 3, seed=4)
    sketch = sketched_gradients(batch, derivatives)(weight)
    from tokencredit.lm.distribution import seed_of

    for k in range(3):
        generator = torch.Generator().manual_seed(seed_of("direction", 4, k))
        u = torch.cat(
            [(torch.randint(0, 2, p.shape, generator=generator).float() * 2 - 1).flatten() for p in parameters.values()]
        )
        assert torch.allclose(sketch[:, k] * math.sqrt(3), x @ u, rtol=1e-3, atol=1e-3 * float((x @ u).abs().max()))


def test_gradients_in_files_have_the_same_products(checkpoint, batch, tmp_path, monkeypatch):
    """Read in blocks that do not divide the parameters; in memory the same up to the order of the sums. Of a large
    model in bfloat16.
    """
    weights = [weights_of(METHODS[name], batch.rollouts) for name in ("rloo", "gtpo", "dapo")]
    x, base, truth = map(exact_gradients(checkpoint, batch), weights)
    known, heard = Reference(base, truth).products(x), []
    monkeypatch.setitem(gradient_matrix.blank.__kwdefaults__, "limit", 0)
    monkeypatch.setattr(gradient_matrix, "READ", 100_000)

    def filed():
        found = list(map(exact_gradients(checkpoint, batch, tmp_path, heard.append), weights))
        assert all(isinstance(each, FiledMatrix) for each in found)
        return Reference(*found[1:]).products(found[0])

    for name, sums in filed().items():
        assert sums == pytest.approx(known[name], rel=1e-9, abs=1e-12 * np.abs(sums).max()), name
    assert sum(heard) == 3 * batch.num_prompts and not list(tmp_path.iterdir())
    monkeypatch.setattr(vectors, "FINE", 0)
    for name, sums in filed().items():
        assert sums == pytest.approx(known[name], rel=1e-2, abs=1e-2 * np.abs(sums).max()), name


def test_sizes_follow_the_model_and_the_task():
    small, large = VarianceConfig().fitted(108_544, None), VarianceConfig().fitted(134_515_008, 10)
    assert (small.prompts, small.group, small.draws) == (384, 8, 16)
    assert (large.prompts, large.group, large.draws) == (10, 4, 4)
    named = VarianceConfig(prompts=40, group=6, draws=3).fitted(134_515_008, None)
    assert (named.prompts, named.group, named.draws) == (40, 6, 3)


def test_directions_are_taken_where_gradients_find_no_disk(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_matrix, "LIMIT", 0)
    asked = VarianceConfig(prompts=8, group=4)
    assert directions_of(asked, checkpoint, tmp_path) == 0
    monkeypatch.setattr(limits, "free", lambda folder: 1 << 20)
    assert directions_of(asked, checkpoint, tmp_path) == SKETCH
    assert directions_of(replace(asked, directions=0), checkpoint, tmp_path) == 0


def test_dynamic_sampling_gives_groups_of_one_outcome_no_weight(batch):
    rollouts, weight = batch.rollouts, weights_of(METHODS["dapo"], batch.rollouts)
    assert rollouts.mixed.any() and not rollouts.mixed.all()
    assert not weight[~rollouts.mixed].any() and weight[rollouts.mixed].any()
    kept = batch.take(rollouts.mixed)
    assert torch.equal(weight[rollouts.mixed], loss_coefficients(METHODS["dapo"], kept)[0])
    same = replace(rollouts, reward=torch.ones_like(rollouts.reward))
    assert not weights_of(METHODS["dapo"], same).any()


def test_the_variance_that_sampling_adds_by_counting_subsets(world):
    """Five tokens with real, correlated gradients: all 32 subsets with their probabilities. Inverse weights are
    unbiased, and the formula is their variance; without 1/q the mean moves."""
    gradients = world.token_gradients[world.token_gradients.square().sum(1) > 0][:5]
    weight = torch.tensor([0.5, -1.0, 0.2, 0.8, -0.3], dtype=torch.float64)
    q = torch.tensor([0.2, 0.9, 0.5, 1.0, 0.05], dtype=torch.float64)
    whole, mean, masked, variance = weight @ gradients, 0, 0, 0.0
    for subset in itertools.product((0.0, 1.0), repeat=5):
        kept = torch.tensor(subset, dtype=torch.float64)
        chance = float(torch.where(kept > 0, q, 1 - q).prod())
        estimate = (kept / q * weight) @ gradients
        mean, masked, variance = (
            mean + chance * estimate,
            masked + chance * (kept * weight) @ gradients,
            variance + chance * float((estimate - whole).square().sum()),
        )
    rollouts = replace(
        world.prompts[0].rollouts.rows(torch.zeros(1, dtype=torch.long)),
        mask=torch.ones(1, 5, dtype=torch.bool),
        scores={"gradient_norm": gradients.norm(dim=1)[None]},
    )
    assert torch.allclose(mean, whole) and (masked - whole).norm() > 0.1 * whole.norm()
    assert float(added_variance(weight[None], rollouts, q[None])) == pytest.approx(variance, rel=1e-9)


def test_the_optimum_is_least_and_draws_agree(checkpoint, batch):
    """At an equal number of tokens no other probabilities add less, random ones included; real subsets have the
    formula's variance.
    """
    weight, rollouts = weights_of(METHODS["grpo"], batch.rollouts), batch.rollouts
    added, kept = {}, {}
    for name, scheme in SCHEMES.items():
        q = scheme.probability(weight, rollouts, 0.3)
        added[name], kept[name] = float(added_variance(weight, rollouts, q).sum()), float(q.sum())
        assert ((q > 0) == (weight != 0)).all() and (q <= 1).all()
    best = next(name for name in SCHEMES if "optimum" in name)
    assert max(kept.values()) == pytest.approx(min(kept.values()), rel=1e-4)
    assert added[best] == min(added.values()) < 0.5 * added["uniform"]
    q = SCHEMES[best].probability(weight, rollouts, 0.3)
    free = (q > 0) & (q < 1)
    for seed in range(20):
        step = torch.randn(int(free.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = q.clone()
        moved[free] += 1e-3 * (step - step.mean()) * q[free].min()
        assert float(added_variance(weight, rollouts, moved).sum()) >= added[best] * (1 - 1e-9)
    found = drawn_check(checkpoint, batch, weight, draws=12, seed=0)
    assert all(abs(each.value - 1) < 4 * (each.high - each.low) / 2 / 2.2 for each in found.values())
    wrong = replace(rollouts, scores={**rollouts.scores, "gradient_norm": 2 * rollouts.score("gradient_norm")})
    off = drawn_check(checkpoint, replace(batch, rollouts=wrong), weight, draws=12, seed=0)["uniform"]
    assert abs(off.value - 1) > 4 * (off.high - off.low) / 2 / 2.2


SMALL = {
    "prompts": 8,
    "group": 4,
    "draws": 2,
    "methods": ("grpo", "random_tokens", "ptw_entropy", "exact_value", "vineppo"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "variance"
    return out, STUDY.run(VarianceConfig(**SMALL), out, command="tokencredit study variance")


@pytest.fixture(scope="module")
def page_path(study):
    out = study[0] / "report.html"
    assert main(["report", str(study[0]), "--out", str(out)]) == 0
    return out


def test_a_study_writes_figures_and_a_table_of_prompts(study):
    out, _ = study
    result = json.loads((out / "result.json").read_text())
    (block,) = result["checkpoints"]
    assert list(block["methods"]) == ["dapo", "grpo", "random_tokens", "ptw_entropy", "exact_value", "vineppo"]
    figure = result["figures"]["reckon/grpo/tokens_apart"]
    assert (
        figure["low"] < figure["value"] < figure["high"]
        and figure["num"] == 8
        and figure["seed"] == 0
        and figure["command"]
    )
    rows = parquet.read_table(out / "prompts.parquet").to_pylist()
    assert len(rows) == 8 * 7 and {"square", "pair", "sum", "truth_own", "credited"} <= rows[0].keys()
    grpo = [row["square"] for row in rows if row["method"] == "grpo"]
    signal = result["figures"]["reckon/grpo/signal"]["value"]
    assert np.mean(grpo) - signal > 0 and {row["prompt"] for row in rows} == set(range(8))
    exact = result["exact"]["methods"]
    assert (
        "random_tokens" not in exact
        and result["figures"][exact["exact_value"]["figures"]["truth_angle"]]["value"] < 1e-5
    )


def test_an_interrupted_study_ends_with_the_same_numbers(study, tmp_path, monkeypatch):
    """Stopped after its second method, then given again."""
    out, made = tmp_path / "variance", []

    def stop(text):
        made.append(text)
        if text.endswith("gradients of random_tokens"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        STUDY.run(VarianceConfig(**SMALL), out, command="tokencredit study variance", say=stop)
    assert not (out / "result.json").exists() and len(list(out.glob("stages/*/method_*.npz"))) == 3
    again = STUDY.run(VarianceConfig(**SMALL), out, command="tokencredit study variance")
    assert {name: each.value for name, each in again["figures"].items()} == pytest.approx(
        {name: each.value for name, each in study[1]["figures"].items()}, nan_ok=True
    )


def test_sketches_estimate_the_same_moments(study, tmp_path):
    """64 directions: squared norms within 4 standard errors, 4 √(2/64)."""
    sketched = STUDY.run(VarianceConfig(**SMALL | {"methods": ("grpo",), "directions": 64}), tmp_path / "sketch")
    paths = {"whole": study[0], "sketch": tmp_path / "sketch"}
    rows = {name: parquet.read_table(path / "prompts.parquet").to_pylist() for name, path in paths.items()}
    found = {name: sum(row["square"] for row in some if row["method"] == "grpo") for name, some in rows.items()}
    assert found["sketch"] == pytest.approx(found["whole"], rel=4 * math.sqrt(2 / 64))
    assert sketched["checkpoints"][0]["directions"] == 64


def test_the_page_opens_and_its_choices_work(opened):
    plane, sampling = opened.locator("#bias-against-variance"), opened.locator("#sampling-tokens")
    plane.get_by_label("Checkpoint").select_option("exact world")
    assert plane.locator("[data-method=exact_value]").count() == 1
    plane.get_by_label("Bias").select_option("angle")
    assert sampling.locator(".curve").count() == len(SCHEMES)
    sampling.get_by_label("Measure").select_option("added")
    assert sampling.locator(".curve .line").count() == len(SCHEMES)
    assert opened.locator("#signal-per-credited-token [data-bar=ptw_entropy]").count() >= 1
    assert "not resolved" in opened.locator("#bias-and-variance-of-every-method").inner_text()


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    with pytest.raises(KeyError, match='Did you mean "ptw_entropy"'):
        VarianceConfig(methods=("ptw_entrop",))
    with pytest.raises(ValueError, match="at least 8 prompts"):
        VarianceConfig(prompts=4)
    with pytest.raises(ValueError, match="auto, exact, rloo, not 'q'"):
        VarianceConfig(truth="q")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="no run directory"):
        checkpoints(VarianceConfig(runs=(str(other),)))
    (other / "run.json").write_text(json.dumps({"task": "gsm8k", "config": {}}))
    with pytest.raises(ValueError, match="trained on gsm8k, the study is about reckon: give --task gsm8k"):
        checkpoints(VarianceConfig(runs=(str(other),)))
    (other / "run.json").write_text(json.dumps({"task": "reckon", "config": {}}))
    with pytest.raises(ValueError, match="no checkpoint of step 3; it has those of none"):
        checkpoints(VarianceConfig(runs=(str(other),), steps=(3,)))
    with pytest.raises(ValueError, match="no finished checkpoint"):
        checkpoints(VarianceConfig(runs=(str(other),)))
    assert main(["study", "variance", "--prompts", "3", "--out", str(tmp_path / "no")]) == 1
    assert "at least 8 prompts" in capsys.readouterr().err and not (tmp_path / "no").exists()


RELATED_ONES = (
    "dhpo",
    "arm",
    "sent",
    "tw_grpo",
    "hicra",
    "abc",
    "spo_chain",
    "entropy_bonus",
    "entropy_bonus_adaptive",
)


def test_related_methods_are_studied_like_the_others(tmp_path):
    """At the first update those that differ from GRPO in their ratios and penalties alone are GRPO; what needs another
    model is refused by the score it needs.
    """
    asked = {"prompts": 8, "group": 4, "draws": 2, "truth": "rloo", "methods": ("grpo", *RELATED_ONES)}
    result = STUDY.run(VarianceConfig(**asked), tmp_path / "study")
    (block,) = result["checkpoints"]
    assert list(block["methods"]) == ["dapo", "grpo", *RELATED_ONES]
    rows = parquet.read_table(tmp_path / "study" / "prompts.parquet").to_pylist()
    squares = {name: [row["square"] for row in rows if row["method"] == name] for name in ("grpo", *RELATED_ONES)}
    assert squares["dhpo"] == pytest.approx(squares["grpo"], rel=1e-6)
    apart = {name for name, x in squares.items() if x != pytest.approx(squares["grpo"], rel=1e-3)}
    assert apart >= {"arm", "tw_grpo", "hicra", "abc", "spo_chain"}
    for name, score in (("rto_group", "implicit_reward"), ("grpo_process", "token_reward"), ("spro", "self_reward")):
        with pytest.raises(ValueError, match=rf"{score} \(.*is measured by nobody here"):
            STUDY.run(VarianceConfig(**asked | {"methods": (name,)}), tmp_path / name)


def test_equal_rewards_give_nothing_to_compare(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(type(checkpoint.task), "verify", lambda *_: Verdict(False, True, "wrong"))
    with pytest.raises(ValueError, match="every group's rewards are equal"):
        STUDY.run(VarianceConfig(prompts=8, group=2, methods=("grpo",), truth="rloo"), tmp_path / "equal")


def test_methods_that_draw_are_left_out_of_the_enumeration():
    names = {method.name for method in measurable([*METHODS.values(), EXACT])}
    assert {"grpo", "otb", "ptw_attention", EXACT.name} <= names and not names & {
        "random_tokens",
        "token_sampling",
        "vineppo",
    }
