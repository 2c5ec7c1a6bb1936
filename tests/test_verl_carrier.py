"""The verl engine's parts that need no verl: what its configuration says, what follows from it, what is refused."""

import copy
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tokencredit import METHODS, Rollouts
from tokencredit.cli import main
from tokencredit.credit import Chain, GroupCenter, Outcome
from tokencredit.engines.after_import import after_import
from tokencredit.engines.verl import doctor
from tokencredit.engines.verl.batch import assign, check_outputs
from tokencredit.engines.verl.carried import CHANNEL, STORED, aggregation, carried, check_scores
from tokencredit.engines.verl.carrier import Carrier, read_carrier
from tokencredit.engines.verl.configuration import find, settle
from tokencredit.engines.verl.losses import policy_loss, register_losses
from tokencredit.engines.verl.plugin import check_version, told
from tokencredit.method import Method
from tokencredit.objective import Clip, SequenceSum, TokenMean

MINE = Method("mine", Chain(Outcome(), GroupCenter()), Clip(0.1, 0.1), TokenMean())


def configuration(**section) -> dict:
    """The part of verl's configuration that is read here, with verl's defaults."""
    return {
        "data": {"max_response_length": 48},
        "algorithm": {
            "adv_estimator": "grpo",
            "use_kl_in_reward": False,
            "filter_groups": {"enable": False},
            "rollout_correction": {"bypass_mode": False},
        },
        "critic": {"enable": None},
        "distillation": {"enabled": False},
        "actor_rollout_ref": {
            "actor": {
                "policy_loss": {"loss_mode": "vanilla"},
                "loss_agg_mode": "token-mean",
                "loss_scale_factor": None,
                "clip_ratio_low": 0.2,
                "clip_ratio_high": 0.2,
            }
        },
        "trainer": {"v1": {"trainer_mode": "tokencredit_sync", "tokencredit": section}},
    }


def changed(config: dict, path: str, value) -> dict:
    config = copy.deepcopy(config)
    *above, last = path.split(".")
    node = config
    for key in above:
        node = node[key]
    node[last] = value
    return config


# --- the carrier ------------------------------------------------------------------------------------------------------


def test_the_carrier_is_read_with_its_options():
    carrier = read_carrier({"method": "gtpo", "method_options": {"alpha": [1, 0.2]}, "success_above": 1, "seed": 3})
    assert carrier == Carrier("gtpo", {"alpha": [1, 0.2]}, 1.0, None, {}, 3)
    assert carrier.build(48) == METHODS["gtpo"].replace(alpha=(1, 0.2)).within(48)


def test_a_method_of_your_own_is_found_by_its_place():
    assert read_carrier({"method": f"{__name__}:MINE"}).build(48) == MINE


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (None, "holds nothing: add \\+trainer.v1.tokencredit.method=gtpo"),
        ({"seed": 1}, "holds seed: add"),
        ({"method": "gtpo", "sucess_above": 1}, "unknown key sucess_above; did you mean success_above"),
        ({"method": 3}, "trainer.v1.tokencredit.method must be text, got 3"),
        ({"method": "gtpo", "method_options": "alpha=1"}, "method_options must be key: value pairs"),
        ({"method": "gtpo", "seed": 0.5}, "seed must be a whole number"),
        ({"method": "gtpo", "dynamic_sampling": "yes"}, "dynamic_sampling must be true, false or null"),
        ({"method": "gtpo", "success_above": True}, "success_above must be a number"),
    ],
)
def test_a_wrong_carrier_says_what_to_write(section, words):
    with pytest.raises(ValueError, match=words):
        read_carrier(section)


def test_a_method_that_there_is_not():
    with pytest.raises(KeyError, match='Did you mean "gtpo"'):
        Carrier("gtpoo").build(48)
    with pytest.raises(ValueError, match="gtpo has no field gamma"):
        Carrier("gtpo", {"gamma": 1}).build(48)
    with pytest.raises(ImportError, match="imported in verl's Ray workers"):
        Carrier("no_such_module:METHOD").build(48)
    with pytest.raises(ValueError, match="is a function, not a Method"):
        Carrier(f"{__name__}:changed").build(48)


# --- how a method is carried ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_carried_in_one_of_two_ways(name):
    method = METHODS[name].within(48)
    how = carried(method)
    assert how.in_channel == bool(how.why)
    if not how.in_channel:
        assert how.loss_mode == f"tokencredit_{name}" and how.loss_agg_mode
        assert not method.surrogate.plans
    if method.surrogate.plans:
        assert how.in_channel and "plan over the whole batch" in how.why


def test_which_methods_need_the_channel():
    found = {name for name, method in METHODS.items() if carried(method.within(48)).in_channel}
    planned = {"clip_cov", "kl_cov", "sent"}
    selected = {"forking_tokens", "random_tokens", "oracle_positions", "spo_chain"}
    assert found == planned | selected


def test_a_changed_surrogate_goes_through_the_channel():
    how = carried(METHODS["gtpo"].replace(high=0.3))
    assert how.loss_mode == CHANNEL and how.why == "this Clip is not that of a method of the table"
    assert carried(MINE).in_channel
    assert not carried(METHODS["gtpo"].replace(alpha=(1, 0.2))).in_channel


def test_aggregations():
    assert aggregation(SequenceSum(1)) == ("seq-mean-token-sum-norm", 1)
    assert aggregation(SequenceSum(48)) == ("seq-mean-token-sum-norm", 48)
    assert aggregation(SequenceSum()) == (None, None)


def test_scores_that_verl_does_not_store_are_named():
    stored = {name for name, method in METHODS.items() if method.needs <= STORED}
    assert {"gtpo", "grpo", "forking_tokens", "random_tokens", "entropy_bonus", "sent"} <= stored
    for name in METHODS.keys() - stored:
        with pytest.raises(ValueError, match="scores"):
            check_scores(METHODS[name], ())
        check_scores(METHODS[name], METHODS[name].needs)
    with pytest.raises(
        ValueError, match=r'"ptw_attention" needs the scores attention.*scores.attention=module:function'
    ):
        check_scores(METHODS["ptw_attention"], ())


# --- verl's configuration ---------------------------------------------------------------------------------------------


def test_what_follows_from_the_method_is_written():
    config = configuration(method="grpo")
    settled = settle(config, "sync")
    actor = config["actor_rollout_ref"]["actor"]
    assert actor["policy_loss"]["loss_mode"] == settled.carried.loss_mode == "tokencredit_grpo"
    assert actor["loss_agg_mode"] == "seq-mean-token-mean"
    assert config["trainer"]["v1"]["trainer_mode"] == "sync"
    assert not config["algorithm"]["filter_groups"]["enable"]


def test_the_completion_budget_reaches_the_sum():
    config = configuration(method="dr_grpo")
    settle(config, "sync")
    actor = config["actor_rollout_ref"]["actor"]
    assert (actor["loss_agg_mode"], actor["loss_scale_factor"]) == ("seq-mean-token-sum-norm", 48)


@pytest.mark.parametrize(("section", "drawn"), [({}, True), ({"dynamic_sampling": False}, False)])
def test_dynamic_sampling_is_the_methods_unless_told(section, drawn):
    config = configuration(method="dapo", **section)
    settle(config, "sync")
    assert config["algorithm"]["filter_groups"]["enable"] == drawn


@pytest.mark.parametrize(
    ("method", "path", "value", "words"),
    [
        ("gtpo", "algorithm.rollout_correction.bypass_mode", True, "bypass_mode=True takes.*set it to False"),
        ("gtpo", "algorithm.use_kl_in_reward", True, "use_kl_in_reward=True.*use_kl_loss"),
        ("gtpo", "algorithm.adv_estimator", "gae", "a critic would be trained"),
        ("gtpo", "critic.enable", True, "a critic would be trained"),
        ("gtpo", "distillation.enabled", True, "distillation.enabled=True"),
        ("gtpo", "actor_rollout_ref.actor.policy_loss.loss_mode", "gspo", "loss_mode=gspo is another loss"),
        (
            "gtpo",
            "actor_rollout_ref.actor.loss_agg_mode",
            "seq-mean-token-sum",
            "loss_agg_mode=seq-mean-token-sum contradicts the method's TokenMean, which is token-mean",
        ),
        ("dr_grpo", "actor_rollout_ref.actor.loss_scale_factor", 100, "method_options.max_length=100"),
        ("gtpo", "actor_rollout_ref.actor.clip_ratio_high", 0.3, "Clip has high=0.28: set .*method_options.high=0.3"),
        ("sapo", "actor_rollout_ref.actor.clip_ratio_low", 0.1, "SAPO has none: leave it unset"),
    ],
)
def test_what_contradicts_the_method_is_refused_by_name(method, path, value, words):
    config = configuration(method=method)
    settle(copy.deepcopy(config), "sync")
    with pytest.raises(ValueError, match=words):
        settle(changed(config, path, value), "sync")


def test_what_agrees_with_the_method_is_not_refused():
    config = changed(configuration(method="gtpo"), "actor_rollout_ref.actor.clip_ratio_high", 0.28)
    settle(config, "sync")
    again = settle(config, "sync")
    assert again.method == METHODS["gtpo"].within(48)


def test_all_faults_are_told_at_once():
    config = changed(configuration(method="gtpo"), "algorithm.use_kl_in_reward", True)
    with pytest.raises(ValueError, match=r"use_kl_in_reward(.|\n)*bypass_mode|bypass_mode(.|\n)*use_kl_in_reward"):
        settle(changed(config, "algorithm.rollout_correction.bypass_mode", True), "sync")


def test_nothing_stands_where_nothing_is():
    assert find({"a": {"b": 1}}, "a.b") == 1
    assert find({"a": {"b": 1}}, "a.c.d") is None and find({"a": 1}, "a.b") is None


# --- the batch --------------------------------------------------------------------------------------------------------


def padded_batch() -> tuple[dict, list[str]]:
    """Two prompts of two rollouts, and a row that verl has added."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    rewards = torch.zeros(mask.shape)
    rewards[0, 2] = rewards[2, 0] = 1
    batch = {
        "response_mask": mask,
        "rm_scores": rewards,
        "old_log_probs": -torch.rand(mask.shape, generator=generator),
        "entropy": torch.rand(mask.shape, generator=generator),
    }
    return batch, ["b", "b", "a", "a", "padding"]


@pytest.mark.parametrize("name", ["gtpo", "kl_cov", "forking_tokens", "random_tokens", "reinforce_pp_baseline"])
def test_the_credit_is_the_methods_over_the_whole_batch(name):
    batch, uid = padded_batch()
    method, carrier = METHODS[name].within(3), Carrier(name, seed=5)
    found = assign(batch, uid, [True] * 4 + [False], method, carrier, step=2, minibatches=4)
    scores = {"entropy": batch["entropy"][:4], "logprob": batch["old_log_probs"][:4]}
    if "uniform" in method.needs:
        scores["uniform"] = found.rollouts.score("uniform")
        assert scores["uniform"][found.rollouts.mask].unique().numel() == 9
    reward = torch.tensor([1.0, 0, 1, 0])
    rollouts = Rollouts(reward, torch.tensor([1, 1, 0, 0]), batch["response_mask"][:4].bool(), scores)
    torch.testing.assert_close(found.credit[:4], method.credit(rollouts))
    old = batch["old_log_probs"][:4]
    plan = method.plan(logprob=old, old_logprob=old, credit=found.credit[:4], rollouts=rollouts)
    torch.testing.assert_close(found.weight[:4], 4 * plan.weight)
    assert (found.coefficient is None) == (plan.coefficient is None)
    if plan.coefficient is not None:
        torch.testing.assert_close(found.coefficient[:4], plan.coefficient)
    assert found.credit[4].abs().sum() == found.weight[4].sum() == 0


def test_rows_that_verl_adds_change_nothing():
    batch, uid = padded_batch()
    bare = {name: x[:4] for name, x in batch.items()}
    method = METHODS["grpo"]
    found = assign(batch, uid, [True] * 4 + [False], method, Carrier("grpo"))
    alone = assign(bare, uid[:4], [True] * 4, method, Carrier("grpo"))
    assert torch.equal(found.credit[:4], alone.credit) and torch.equal(found.weight[:4], alone.weight)


def test_further_outputs_of_a_rollout_are_refused():
    check_outputs(["a_0_0", "a_1_0", "pad12_0_0"])
    with pytest.raises(ValueError, match="1 rows, a_1_1 the first, are further outputs of a rollout"):
        check_outputs(["a_0_0", "a_1_0", "a_1_1"])


def halves(batch):
    return torch.full(batch["response_mask"].shape, 0.5)


def scalar(batch):
    return torch.ones(len(batch["response_mask"]))


def test_scores_of_your_own_are_called_with_the_batch():
    batch, uid = padded_batch()
    carrier = Carrier("exact_value", scores={"exact_value": f"{__name__}:halves"})
    found = assign(batch, uid, [True] * 4 + [False], METHODS["exact_value"], carrier)
    assert torch.equal(found.credit[:4], 0.5 * batch["response_mask"][:4])
    wrong = Carrier("exact_value", scores={"exact_value": f"{__name__}:scalar"})
    with pytest.raises(
        ValueError, match=r'must return the score "exact_value" as \[B, T\] = \[4, 3\], got shape \[4\]'
    ):
        assign(batch, uid, [True] * 4 + [False], METHODS["exact_value"], wrong)


# --- registering ------------------------------------------------------------------------------------------------------


def test_the_registry_gets_a_loss_for_every_method_that_the_signature_carries():
    registry = {}
    core = SimpleNamespace(register_policy_loss=lambda name: lambda f: registry.setdefault(name, f), agg_loss=None)
    register_losses(core)
    carriable = {f"tokencredit_{n}" for n, m in METHODS.items() if not carried(m.within(48)).in_channel}
    assert set(registry) == carriable | {CHANNEL}


def test_a_policy_loss_is_the_surrogates_loss_aggregated():
    old, new = -torch.rand(2, 3), (-torch.rand(2, 3)).requires_grad_()
    mask, credit = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.randn(2, 3)
    heard = {}

    def agg_loss(**given):
        heard.update(given)
        return given["loss_mat"].sum()

    surrogate = METHODS["gtpo"].surrogate
    loss = policy_loss(surrogate, agg_loss)
    config = SimpleNamespace(global_batch_info={"dp_size": 2})
    weights = torch.full((2, 3), 0.5)
    weights[0, 2] = torch.nan
    value, stats = loss(
        old_log_prob=old, log_prob=new, advantages=credit, response_mask=mask, config=config, rollout_is_weights=weights
    )
    expected = 0.5 * surrogate(new, old, credit, mask.bool())[0].sum()
    torch.testing.assert_close(value, expected)
    assert heard["dp_size"] == 2 and heard["loss_agg_mode"] == "token-mean"
    assert all(name.startswith("actor/") and isinstance(stat, float) for name, stat in stats.items())


def test_the_entry_point_names_a_module_that_exists():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    [module] = project["entry-points"]["verl.plugins"].values()
    assert (root / "src" / Path(*module.split("."))).with_suffix(".py").exists()
    assert importlib.metadata.version("tokencredit")


@pytest.mark.parametrize(("version", "fits"), [("0.9.1", True), ("0.9.0", True), ("0.8.3", False), ("0.10.0", False)])
def test_versions_of_verl(version, fits):
    if fits:
        check_version(version)
    else:
        with pytest.raises(ImportError, match=f"here is verl {version}"):
            check_version(version)


def test_an_error_of_the_plugin_is_printed_before_it_is_swallowed(capsys):
    def fails(module):
        raise RuntimeError("the reason")

    with pytest.raises(RuntimeError):
        told(fails)(ModuleType("m"))
    assert "its plugin for verl failed" in (heard := capsys.readouterr().err) and "the reason" in heard


def test_the_doctor_says_which_extra_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "importable", lambda module: False)
    assert main(["doctor", "verl", "--methods"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "missing: verl: pip install 'tokencredit[verl]'" in said and "verl in this process" in said
    assert all(name[:8] in said for name in METHODS)


def test_what_the_plugin_has_not_registered_is_explained(monkeypatch):
    registered = (tuple(doctor.TRAINERS), (CHANNEL, "tokencredit_grpo"))
    assert doctor._unregistered("auto", registered[1], registered[0]) == []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="tokencredit")])
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in doctor._unregistered("none", (), ())[0]
    assert "see what it printed" in doctor._unregistered("auto", (), ())[0]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "PYTHONPATH alone has none" in doctor._unregistered("auto", (), ())[0]


def test_something_is_done_after_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_module.py").write_text("value = 1\n")
    heard = []
    after_import("late_module", lambda module: heard.append(("first", module.value)))
    after_import("late_module", lambda module: heard.append(("second", module.value)))
    assert not heard and "late_module" not in sys.modules
    import late_module  # noqa: F401

    assert heard == [("first", 1), ("second", 1)]
    after_import("late_module", lambda module: heard.append(("third", module.value)))
    assert heard[-1] == ("third", 1)
    monkeypatch.delitem(sys.modules, "late_module")


def test_a_module_that_is_not_there_stays_missing():
    after_import("no_such_module_at_all", print)
    with pytest.raises(ModuleNotFoundError):
        import no_such_module_at_all  # noqa: F401
