"""The theory study: every statement's check passes, every check rejects a claim that is false, and what the checks are
built of.
"""

import json
import math

import pytest
import torch

from tokencredit.cli import main
from tokencredit.tasks.exact import TabularPolicy
from tokencredit.theory import (
    entropy,
    grpo,
    gtpo,
    means,
    network,
    rows,
    soft,
    variance,
    weighting,
)
from tokencredit.theory.checks import FAMILIES, STATEMENTS, run, select
from tokencredit.theory.solver import Solver
from tokencredit.theory.statement import Check, Statement

torch.set_num_threads(1)


@pytest.mark.parametrize("key", STATEMENTS)
def test_statement_passes_its_check(key):
    found = STATEMENTS[key].check()
    assert not found.failed
    assert found.figures and all(math.isfinite(value) for value in found.figures.values())


PLANTED = {
    "a hundredth less than G's bound": (
        entropy.check_collision,
        {"slack": lambda g, h: 0.99 * (1 - math.exp(-h)) - g},
        "holds",
    ),
    "G >= 1 - e^-H": (entropy.check_collision, {"slack": lambda g, h: g - (1 - math.exp(-h))}, "holds"),
    "G <= H, as if attained": (entropy.check_collision, {"slack": lambda g, h: h - g}, "attained"),
    "L1 with a smaller constant": (entropy.check_log_linear, {"constant": 0.49}, "mean square holds"),
    "L1 with a larger constant": (entropy.check_log_linear, {"constant": 0.51}, "mean square attained"),
    "L1 pointwise": (entropy.check_log_linear, {"pointwise": lambda p, h: h.sqrt()}, "pointwise holds"),
    "L1 pointwise, ten times": (entropy.check_log_linear, {"pointwise": lambda p, h: 10 * h.sqrt()}, "pointwise holds"),
    "L2 broken earlier": (entropy.check_trace_bound, {"threshold": 2.0}, "broken 1 % above it"),
    "L2 broken later": (entropy.check_trace_bound, {"threshold": 3.0}, "holds up to the threshold"),
    "a network with a smaller constant": (
        network.check_network,
        {"constant": 0.2, "prompts": 2},
        "tr F <= constant D^2 G",
    ),
    "mirror without the last policy's odds": (
        grpo.check_mirror,
        {"claimed": lambda p, ref, beta, mirror, *gain: grpo.step(p, ref, beta + mirror, *gain)},
        "both: solved = recursion",
    ),
    "T as weights": (variance.check_weights, {"power": 1.0}, "claimed weights reach the least variance"),
    "weights ~ 1/sd": (variance.check_weights, {"power": -1.0}, "no other weights are better"),
    "q ~ |x|^2": (variance.check_sampling, {"power": 2.0}, "claimed q reach the least variance"),
    "q equal": (variance.check_sampling, {"power": 0.0}, "no other q are better"),
    "pi ~ sqrt(tr F)": (variance.check_sampling, {"rule": "root_fisher"}, "no other score of the prefix is better"),
    "shrinkage that grows with variance": (
        weighting.check_shrinkage,
        {"factor": lambda s, v: v / (s + v)},
        "claimed weights reach the least MSE",
    ),
    "no shrinkage": (
        weighting.check_shrinkage,
        {"factor": lambda s, v: torch.ones_like(s)},
        "no other weights are better",
    ),
    "V as the best baseline": (
        weighting.check_baseline,
        {"formula": "V"},
        "tabular: formula reaches the least variance",
    ),
    "own energy with shared parameters": (
        weighting.check_baseline,
        {"formula": "E[R|g|^2]/E|g|^2"},
        "shared: formula reaches the least variance",
    ),
    "surprisal as a harmless weight": (
        weighting.check_weighting,
        {"unbiased": ("entropy", "root_fisher", "surprisal")},
        "surprisal: a baseline cannot bias it",
    ),
    "mass of the base reward alone": (gtpo.check_mass, {"mass": 1.0}, "mass is conserved"),
    "mass with geometric means": (gtpo.check_mass, {"mean": "geometric"}, "mass is conserved"),
    "mass within a rollout": (gtpo.check_mass, {"compare": "row"}, "mass is conserved"),
    "GRPO-S's mass with geometric means": (
        gtpo.check_mass,
        {"level": "sequence", "mean": "geometric"},
        "mass is conserved",
    ),
    "alike entropies that keep a bias": (
        gtpo.check_consistency,
        {"ratio": 1.0},
        "entropies that only go to 0: it stays",
    ),
    "GTPO compared within the rollout": (gtpo.check_optimum, {"compare": "row"}, "rows are parallel to the gradient's"),
    "GTPO's factors": (gtpo.check_optimum, {"least_factor": 4.0}, "factors are large enough"),
    "GRPO's credit against its sign": (gtpo.check_sign, {"method": "grpo"}, "credit does not with 15 of 16 right"),
    "token means up to a larger correlation": (means.check_means, {"rho_star": 0.4}, "token mean better below rho*"),
    "token means up to a smaller correlation": (
        means.check_means,
        {"rho_star": 0.2},
        "token mean worse above rho*, and at rho = 1",
    ),
    "recursion without failures": (
        grpo.check_recursion,
        {"claimed": lambda p: 1 / math.sqrt(p)},
        "mean and std: solved = recursion",
    ),
    "always convergent": (grpo.check_fixed_point, {"stable": lambda slope: True}, "slope decides convergence"),
    "a wider clip": (grpo.check_clip, {"clip": 0.3}, "no ascent beats the claimed optimum"),
    "no clip": (grpo.check_clip, {"clip": 100.0}, "the ascent comes to the same place"),
    "Q - V whatever beta": (
        soft.check_soft_advantage,
        {"claimed": lambda value, beta: value},
        "beta = 0.1: the implicit reward is the claimed one",
    ),
    "log V whatever beta": (
        soft.check_soft_advantage,
        {"claimed": lambda value, beta: beta * value.clamp(min=1e-9).log()},
        "beta = 100: the implicit reward is the claimed one",
    ),
    "groups as if infinite": (
        grpo.check_groups,
        {"claimed": lambda p, size: grpo.whitened(p)},
        "closed form = enumeration",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_false_claim_is_rejected_for_its_reason(name):
    check, claim, reason = PLANTED[name]
    assert reason in check(**claim).failed


def test_every_family_has_a_planted_claim():
    assert {check.__module__ for check, _, _ in PLANTED.values()} == {family.__name__ for family in FAMILIES}


def test_a_check_must_be_able_to_fail():
    with pytest.raises(ValueError, match="cannot fail"):
        Check({"x": 1.0}, {})


def test_collision_bound_by_hand():
    """A fair coin: G = 1/2 at H = ln 2. Two bits, four even sides: G = 3/4 at H = 2 ln 2, where 1 − e^−H is the smaller
    bound.
    """
    assert entropy.collision_bound(math.log(2)) == pytest.approx(0.5)
    assert entropy.collision_bound(2 * math.log(2)) == pytest.approx(0.75)
    assert entropy.collision_bound(0.1) == pytest.approx(0.1 / (2 * math.log(2)))
    p = entropy.rare_token(1e-12)
    assert float(entropy.collision(p)) == pytest.approx(2e-12, rel=1e-9)


def test_rows_are_the_gradient_and_its_second_moment():
    policy = TabularPolicy(rows.SMALL, seed=3)
    exact = rows.SMALL.enumerate(policy)
    found = rows.rows_of(rows.enumeration_of(rows.SMALL, seed=3, scale=1.0))
    torch.testing.assert_close(found.gradient, torch.cat(exact.policy_gradient(policy.parameters())))
    _, _, chance, reward = exact.completions
    vectors = rows.score_vectors(rows.enumeration_of(rows.SMALL, seed=3, scale=1.0))
    each = ((reward - 0.3)[:, None, None] * vectors.sum(1)).square().sum(2)
    torch.testing.assert_close(found.energy(0.3), chance.detach() @ each)


def test_score_vectors_are_derivatives_of_log_probabilities():
    policy = TabularPolicy(rows.SMALL, seed=3)
    _, _, chance, _ = rows.SMALL.enumerate(policy).completions
    vectors = rows.score_vectors(rows.enumeration_of(rows.SMALL, seed=3, scale=1.0)).sum(1)
    for i in (0, 5, 39):
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(chance[i].log(), list(policy.parameters()), **options)
        torch.testing.assert_close(vectors[i], torch.cat(found))


def test_keep_probabilities_meet_the_budget_by_hand():
    """Scores 1, 2, 10 at budget 1.75: the last is capped at 1, the others share 0.75 as 0.25 and 0.5."""
    keep = variance.keep_probability(torch.tensor([1.0, 2.0, 10.0]).double(), torch.ones(3).double(), 1.75)
    torch.testing.assert_close(keep, torch.tensor([0.25, 0.5, 1.0]).double())


def test_correlation_threshold_by_hand():
    """Lengths 1 and 2: δ₁ = (1 + 1/2)/4 − 1/3 = 1/24, δ₂ = 5/9 − 1/2 = 1/18, ρ* = (1/24) / (1/24 + 1/18) = 3/7."""
    assert means.threshold(torch.tensor([1, 2])) == pytest.approx(3 / 7)
    assert means.variances(torch.tensor([1, 2]), 0.0) == pytest.approx((1 / 4 * 3 / 8, 1 / 4 / 3))
    assert means.variances(torch.tensor([1, 2]), 1.0) == pytest.approx((1 / 4 / 2, 1 / 4 * 5 / 9))


def test_groups_of_two_by_hand():
    """Mixed pairs have credit ±(1/2) / √(1/2): E[A | 1] = (1 − p)/√2, E[A | 0] = −p/√2, so Δ = 1/√2 at every p."""
    for p in (0.01, 0.3, 0.9):
        assert grpo.group_gain(p, 2) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("p,ref", [(0.2, 0.2), (0.4, 0.1), (0.9, 0.3), (0.6, 0.05), (0.3, 0.6)])
@pytest.mark.parametrize("beta", [0.04, 1.0, 1.5, 2.0, 5.0, 9.0])
def test_clipped_step_is_the_maximum_on_a_grid(p, ref, beta):
    """Of Δ min(x, p(1 + c)) (1 − p) − Δ p max(1 − x, (1 − c)(1 − p)) − β KL(x ‖ ref), where x is the success
    probability.
    """
    x = torch.linspace(1e-6, 1 - 1e-6, 400_001, dtype=torch.float64)
    gain = grpo.whitened(p)
    earned = (1 - p) * x.clamp(max=p * 1.2) - p * (1 - x).clamp(min=0.8 * (1 - p))
    kl = x * (x / ref).log() + (1 - x) * ((1 - x) / (1 - ref)).log()
    assert grpo.clipped_step(p, ref, beta) == pytest.approx(float(x[(gain * earned - beta * kl).argmax()]), abs=1e-5)


def test_recursion_by_hand():
    """p_ref = 1/2, β = 2: Δ(1/2) = 2, so p₁ = σ(1). A fixed point has slope h', also by differences."""
    assert grpo.step(0.5, 0.5, 2.0) == pytest.approx(1 / (1 + math.exp(-1)))
    p = grpo.fixed_points(0.3, 2.0)[0]
    assert grpo.step(p, 0.3, 2.0) == pytest.approx(p, abs=1e-12)
    rise = (grpo.step(p + 1e-6, 0.3, 2.0) - grpo.step(p - 1e-6, 0.3, 2.0)) / 2e-6
    assert grpo.slope(p, 2.0) == pytest.approx(rise, rel=1e-6)


def test_soft_advantage_by_hand():
    """V = .3 → .6 → .2 → 1: at β = 1, κ = e − 1 and log(1 + .6κ) − log(1 + .3κ) = .292778, and so on."""
    value = torch.tensor([0.3, 0.6, 0.2, 1.0], dtype=torch.float64)
    for beta, expected in (
        (100.0, [0.3001, -0.4004, 0.7992]),
        (1.0, [0.292778, -0.413119, 0.704605]),
        (0.1, [0.069307, -0.109846, 0.160926]),
    ):
        assert soft.soft_advantage(value[:-1], value[1:], beta).tolist() == pytest.approx(expected, abs=1e-4)


def test_solver_finds_the_gibbs_policy():
    """π ∝ π_ref e^(A/β), completion by completion."""
    solver = Solver(seed=2)
    p = solver.success
    target = solver.reference * ((solver.reward - p) / math.sqrt(p * (1 - p)) / 1.5).exp()
    solver.solve(grpo.whitened, 1.5)
    torch.testing.assert_close(solver.chances().detach(), target / target.sum(), atol=1e-6, rtol=0)


def test_names_are_found_in_any_case_and_the_nearest_is_named():
    assert [each.key for each in select(["grpo-CLIP", "l1", "L1"])] == ["GRPO-clip", "L1"]
    assert len(select()) == len(STATEMENTS)
    with pytest.raises(ValueError, match=r"no statement is called 'L3'\. Did you mean 'L[12]'\? Statements: G, L1"):
        select(["L3"])


def test_command_prints_json_and_writes_it(capsys, tmp_path):
    assert main(["study", "theory", "--json", "--only", "L2", "T", "--out", str(tmp_path / "theory.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "theory.json").read_text())
    assert printed["passed"] and list(printed["statements"]) == ["L2", "T"]
    assert printed["statements"]["T"]["verdict"] == "false" and printed["statements"]["T"]["conditions"]
    again = run(["L2"])["statements"]["L2"]
    assert printed["statements"]["L2"]["figures"] == pytest.approx(again["figures"])
    assert printed["statements"]["L2"]["conditions"] == again["conditions"]


def test_command_fails_where_a_check_fails(capsys, monkeypatch):
    wrong = Statement("T", "weights", "true", "nowhere", "none", lambda: variance.check_weights(power=1.0))
    monkeypatch.setitem(STATEMENTS, "T", wrong)
    assert main(["study", "theory", "--only", "T"]) == 1
    assert "fails" in capsys.readouterr().out
    assert main(["study", "theory", "--only", "nonsense"]) == 1
