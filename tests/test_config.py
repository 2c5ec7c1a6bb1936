"""TrainConfig: files, flags and settings fill the same fields, and what is wrong is named with where it came from."""

import json
import re
from dataclasses import fields

import pytest

from tokencredit.train_config import TrainConfig, field_table, read_config, read_settings


def test_file_then_flags_then_settings(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "steps: 7\ngroup: 4\nlearning_rate: 5e-4\ntrl:\n  warmup_ratio: 1e-1\n  bf16: false\n"
    )
    found = read_config(tmp_path / "a.yaml", ["group=16", "trl.bf16=true", "trl.beta=.5"], steps=9, method=None)
    assert (found.steps, found.group, found.learning_rate, found.method) == (9, 16, 5e-4, "grpo")
    assert found.trl == {"warmup_ratio": 0.1, "bf16": True, "beta": 0.5}
    (tmp_path / "a.json").write_text(json.dumps(found.as_dict()))
    assert read_config(tmp_path / "a.json") == found
    assert read_config(None) == TrainConfig()


def test_a_flag_s_options_of_the_task_are_added_to_the_file_s(tmp_path):
    (tmp_path / "a.yaml").write_text("task: gsm8k\ntask_options: {path: x, template: plain}\n")
    whole = {"path": "x", "template": "plain", "strict": True}
    for task in (None, "gsm8k"):
        assert read_config(tmp_path / "a.yaml", task=task, task_options={"strict": True}).task_options == whole
    other = read_config(tmp_path / "a.yaml", task="reckon", task_options={"operands": [3]})
    assert other.task_options == {"operands": [3]}


@pytest.mark.parametrize(
    "text, value",
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("-2.e-1", -0.2),
        ("3", 3),
        ("[1, 2e-1]", [1, 0.2]),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("batch", "batch"),
        ("e5", "e5"),
        ("{a: 1}", {"a": 1}),
        ("", None),
        ("a=b", "a=b"),
    ],
)
def test_settings_are_yaml_with_the_numbers_people_write(text, value):
    assert read_settings([f"x={text}"]) == {"x": value}


def test_method_options_reach_the_method():
    found = read_config(None, ["method_options.alpha=[1, 0.2]", "method_options.Clip.high=3e-1"], method="gtpo")
    assert found.build_method().hyperparameters()["EntropyReward.alpha"] == (1, 0.2)
    assert found.build_method().hyperparameters()["Clip.high"] == 0.3
    with pytest.raises(ValueError, match="gtpo has no field alhpa; it has: Clip"):
        read_config(None, ["method_options.alhpa=1"], method="gtpo").build_method()
    with pytest.raises(KeyError, match="Did you mean"):
        TrainConfig(method="gtop").build_method()


def test_learning_rate_suits_the_task_unless_it_is_given():
    assert TrainConfig().learning_rate == 5e-4
    assert TrainConfig(task="gsm8k", model="Qwen/Qwen2.5-0.5B").learning_rate == 1e-6
    assert TrainConfig(task="gsm8k", learning_rate=3e-6).learning_rate == 3e-6
    assert TrainConfig(learning_rate=1).learning_rate == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        (["step=3"], "--set step=3: unknown key step; did you mean steps?"),
        (["zzz=3"], "--set zzz=3: unknown key zzz. Keys: task, "),
        (["steps"], "--set takes key=value, got 'steps'"),
        (["steps=many"], "steps must be a whole number, got 'many'"),
        (["steps=2.5"], "steps must be a whole number, got 2.5"),
        (["steps=true"], "steps must be a whole number, got True"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["steps="], "steps must be a whole number, got None"),
        (["save_every=-1"], "save_every must be at least 0, got -1"),
        (["threads=0"], "threads must be at least 1, got 0"),
        (["max_new_tokens=1.5"], "max_new_tokens must be a whole number, got 1.5"),
        (["learning_rate=fast"], "learning_rate must be a number, got 'fast'"),
        (["learning_rate=.nan"], "learning_rate must be positive and finite, got nan"),
        (["temperature=0"], "temperature must be positive and finite, got 0.0"),
        (["method=3"], "method must be text, got 3"),
        (["trl=3"], "trl must be key: value pairs, got 3"),
        (["trl=3", "trl.beta=1"], "--set trl.beta=1: trl is 3, which has no fields"),
        (["group=1"], "group must be at least 2: a rollout is compared with the others of its prompt"),
        (["prompts=3", "group=2", "minibatches=4"], "3 prompts x 2 rollouts do not split into 4 minibatches"),
        (["prompts=3", "group=2", "accumulate=4"], "do not split into 1 minibatches of 4 passes"),
        (["trl=[1"], "--set trl: cannot be read (while parsing a flow"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(None, settings)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "grup: 4", "a.yaml: unknown key grup; did you mean group?"),
        ("a.yaml", "- 1", "a.yaml must hold key: value pairs, it holds list"),
        ("a.yaml", "", "a.yaml must hold key: value pairs, it holds NoneType"),
        ("a.yaml", "a: [", "a.yaml: cannot be read"),
        ("a.json", "{", "a.json: cannot be read"),
        ("a.json", '{"learning_rate": "5e-4"}', "learning_rate must be a number, got '5e-4'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(tmp_path / name)


def test_every_field_is_explained():
    table, names = field_table(), [f.name for f in fields(TrainConfig)]
    told = set(re.findall(r"\w+", table))
    assert set(names) <= told
    assert max(map(len, table.splitlines())) <= 80


def test_optimizer_steps():
    assert TrainConfig(steps=5, updates=3, minibatches=2, accumulate=4).optimizer_steps == 30


def test_an_evaluation_is_smaller_where_answers_take_longer():
    sizes = lambda **own: (lambda c: (c.eval_prompts, c.eval_samples))(TrainConfig(**own))  # noqa: E731
    assert sizes() == (256, 8) and sizes(task="stories") == sizes(task="") == (64, 4)
    assert sizes(task="stories", eval_samples=8) == (64, 8), "as asked"
