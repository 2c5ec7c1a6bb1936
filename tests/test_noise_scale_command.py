"""The noise scale of a checkpoint: gradients against autograd, sketches against whole ones, the command and its
page.
"""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from tokencredit import METHODS
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.gradient_products import flat, products, sketch
from tokencredit.dynamics.noise_scale import noise_scale
from tokencredit.studies.noise_scale.measurement import measure

NAMES = ("signal", "noise", "scale")


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("reckon", dtype=torch.float64, task_options={"operands": [3]})


@pytest.fixture(scope="module")
def batch(checkpoint):
    return draw(checkpoint, 12, 4, 0)


def prompt_gradients(checkpoint, method, batch):
    """[P, D]: P times each prompt's part of the gradient of the method's loss, by autograd over the whole batch."""
    rollouts = batch.rollouts
    model = checkpoint.model
    rows = []
    for prompt, completion in zip(batch.prompts, batch.completions):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(chosen, (0, rollouts.mask.shape[1] - len(completion))))
    logprob = torch.stack(rows)
    found = []
    for p in range(batch.num_prompts):
        own = torch.where((rollouts.group_index == p)[:, None], logprob, logprob.detach())
        loss, _ = method.loss(
            logprob=own, old_logprob=logprob.detach(), credit=method.credit(rollouts), rollouts=rollouts
        )
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]) * batch.num_prompts)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["grpo", "gtpo", "rloo"])
def test_a_methods_noise_is_that_of_its_losses_gradients(checkpoint, batch, name):
    method = METHODS[name].within(checkpoint.max_new_tokens)
    x = prompt_gradients(checkpoint, method, batch)
    found, expected = measure(checkpoint, method, batch), noise_scale(x @ x.T)
    for figure in NAMES:
        for end in ("value", "low"):
            assert getattr(getattr(found.own, figure), end) == pytest.approx(
                getattr(getattr(expected, figure), end), rel=1e-5, abs=1e-7
            )
    assert found.own.p_noise == expected.p_noise and found.prompts == 12 and found.sketched is None
    if name == "rloo":  # whose credit is leave-one-out itself
        for figure in NAMES:
            assert getattr(found.plain, figure).value == pytest.approx(
                getattr(found.own, figure).value, rel=1e-5, abs=1e-7
            )
        assert found.split.variance(1, 4).value == pytest.approx(found.own.noise.value, rel=1e-5)


def test_dynamic_sampling_counts_mixed_groups_alone(checkpoint, batch):
    method = METHODS["dapo"].within(checkpoint.max_new_tokens)
    mixed = batch.rollouts.mixed.reshape(-1, 4)[:, 0]
    assert 3 <= mixed.sum() < 12 and measure(checkpoint, method, batch).prompts == mixed.sum()


def test_sketches_keep_products_on_average_and_squares_exactly(checkpoint, batch):
    passes, index = batch.passes(checkpoint), batch.rollouts.group_index
    weight = batch.rollouts.mask.double() * batch.rollouts.reward[:, None]
    weights = [weight * (index == p)[:, None] for p in range(6)]
    whole, none = products(passes, weights, 6)
    vectors = torch.stack([flat(passes.reverse(w)) for w in weights])
    assert none is None and torch.allclose(whole, vectors @ vectors.T, rtol=1e-5, atol=1e-6 * float(whole.max()))
    width = 500
    draws = []
    for seed in range(40):
        sketched, kept = products(passes, weights, 6, limit=6 * 4 * width, seed=seed)
        assert kept == width and torch.allclose(sketched.diagonal(), whole.diagonal(), rtol=1e-5)
        draws.append(sketched)
    gap = torch.stack(draws) - whole
    norms = whole.diagonal().sqrt()
    alive = (norms[:, None] * norms[None] > 0) & ~torch.eye(6, dtype=torch.bool)
    error = gap.std(0) / 40**0.5
    assert alive.sum() >= 6 and (gap.mean(0).abs() < 4 * error)[alive].all()
    assert (gap.square().mean(0).sqrt()[alive] < 2 * (norms[:, None] * norms[None] * (2 / width) ** 0.5)[alive]).all()


def test_a_sketch_is_linear_and_its_seed_is_its_own():
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(sketch([a], 64, 1) + 2 * sketch([b], 64, 1), sketch([a + 2 * b], 64, 1))
    for cuts in ([1000], [1, 63, 64, 200, 672], [500, 500], [999, 1]):
        assert torch.equal(sketch(a.split(cuts), 64, 1), sketch([a], 64, 1)), "pieces change nothing"
    assert not torch.allclose(sketch([a], 64, 1), sketch([a], 64, 2))
    assert float(sketch([torch.eye(1000, dtype=torch.float64)[7]], 64, 0).abs().sum()) == 1


def run(*arguments):
    from tokencredit.cli import main

    return main(["dynamics", "noise-scale", *map(str, arguments)])


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    out = tmp_path_factory.mktemp("noise")
    assert (
        run("--run", "reckon", "--prompts", 12, "--group", 4, "--method", "gtpo", "--cost-prompt", 2, "--out", out) == 0
    )
    return out


@pytest.fixture(scope="module")
def page_path(answered):
    return answered / "report.html"


def test_the_command_writes_figures_and_a_grid(answered):
    import pyarrow.parquet

    result = json.loads((answered / "result.json").read_text())
    grid = pyarrow.parquet.read_table(answered / "grid.parquet").to_pylist()
    assert result["method"] == "gtpo" and result["command"].startswith("tokencredit dynamics noise-scale")
    assert (
        grid == result["grid"] and {row["prompts"] for row in grid} >= {64} and {row["group"] for row in grid} >= {4, 8}
    )
    tau, alpha, beta = (result["figures"][f"split/{name}"]["value"] for name in ("between", "rollout", "pair"))
    for row in grid:
        k = row["group"]
        assert row["variance"] == pytest.approx((tau + alpha / k + beta / (k * (k - 1))) / row["prompts"])
        assert row["low"] <= row["variance"] <= row["high"] and row["cost"] == row["prompts"] * (2 + k)
    [own] = [row for row in grid if (row["prompts"], row["group"]) == (12, 4)]
    assert own["relative"] == 1 and own["cost"] == result["costs"]["budget"] == 72 >= result["choice"]["cost"]
    assert result["reference"] == "the batch drawn here", "there is no run"
    assert result["figures"]["scale_rollouts"]["low"] == pytest.approx(4 * result["figures"]["scale"]["low"])


def test_the_page_shows_the_map(opened, answered):
    result = json.loads((answered / "result.json").read_text())
    assert opened.locator(".heat rect").count() == len(result["grid"])
    assert not result["choice"]["resolved"] and opened.locator(".heat circle").count() == 1
    assert opened.locator(".heat polyline").get_attribute("points")
    assert opened.locator("tbody tr").count() == len(result["figures"])


def test_too_little_to_ask_about_is_refused_with_what_to_do(capsys, tmp_path):
    refused = {
        ("--prompts", 2): "--prompts must be at least 3",
        ("--group", 1): "--group must be at least 2",
        ("--prompts", 3, "--method", "nothing"): "nothing",
    }
    for arguments, said in refused.items():
        assert run("--run", "reckon", *arguments, "--out", tmp_path) != 0
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--run", "reckon", "--cost-rollout", 0, "--out", tmp_path)
    assert "argument --cost-rollout: must be a number above 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_small_groups_and_unresolved_signals_are_said(capsys, tmp_path):
    """In a directory whose name is no markup: it is printed as it is."""
    out = tmp_path / "a[x]b"
    assert run("--run", "reckon", "--prompts", 4, "--group", 2, "--out", out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((out / "result.json").read_text())
    assert f"Report: {out / 'report.html'}; figures: {out / 'result.json'}" in printed
    assert (
        "Where the noise comes from cannot be told from groups of 2: that takes 4" in printed
        and result["choice"] is None
    )
    assert (
        not result["resolved"]
        and result["p_noise"] > 0.05
        and "|G|² is not resolved: noise alone would give" in printed
    )
    assert result["figures"]["scale"]["high"] is None and "(--prompts 16)" in printed
    assert not (out / "grid.parquet").exists() and (out / "report.html").exists()


def test_a_killed_study_goes_on_with_the_same_numbers(answered, tmp_path):
    """The products of gradients are kept; what is made of them is made again."""
    other = tmp_path / "again"
    shutil.copytree(answered, other)
    (other / "result.json").unlink()
    stamp = (other / "stages" / "products.npz").stat().st_mtime_ns
    asked = ("--run", "reckon", "--prompts", 12, "--group", 4, "--method", "gtpo", "--cost-prompt", 2, "--out", other)
    assert run(*asked) == 0 and (other / "stages" / "products.npz").stat().st_mtime_ns == stamp
    first, second = (json.loads((path / "result.json").read_text()) for path in (answered, other))
    for name, figure in first["figures"].items():
        assert second["figures"][name] == {**figure, "command": second["command"]}
    assert run(*asked[:-2], "--seed", 1, "--out", other) == 1, "another question has another directory"


def test_a_batch_without_any_credit_is_refused(checkpoint, batch):
    same = dataclasses.replace(
        batch, rollouts=dataclasses.replace(batch.rollouts, reward=torch.ones(len(batch), dtype=torch.float64))
    )
    with pytest.raises(ValueError, match="every group's rewards are equal"):
        measure(checkpoint, METHODS["grpo"], same)
    assert math.isfinite(measure(checkpoint, METHODS["grpo"], batch).own.noise.value)
