"""A policy is opened in one place: from a name, from a run, from a command line; what cannot be opened says why."""

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch

from chats import chat_model_in
from tokencredit.checkpoints import seal
from tokencredit.cli import main
from tokencredit.lm.arguments import policy_config, rows_of
from tokencredit.lm.load import find_device, load_tokenizer, run_of
from tokencredit.lm.policy import Policy, PolicyConfig, usual_limit
from tokencredit.lm.prompts import encode_completion, encode_prompt, prompt_text, set_template_options
from tokencredit.scores import SCORES, available
from tokencredit.scores.measure import measure
from tokencredit.tasks import load
from tokencredit.tasks.reckon import Reckon, model_path
from tokencredit.tasks.task import Deciding, Endless, Roles, Steps, Task, Walkable

CHAT = "{% for m in messages %}{{ m['content'] }} = {% endfor %}"
VERIFIER = "def check(completion, row):\n    return completion.split()[-1:] == [str(row['answer'])]\n"


@pytest.fixture(scope="module")
def policy():
    return PolicyConfig().open()


@pytest.fixture
def chat_model(tmp_path):
    """The shipped model, with a chat template that writes what is said and an equals sign."""
    return chat_model_in(tmp_path / "chat", CHAT)


@pytest.fixture
def own(tmp_path):
    """A task of one's own: a verifier and a file of prompts. (arguments of a command line)"""
    (tmp_path / "verify.py").write_text(VERIFIER)
    drawn = [row for split in ("train", "test") for row in Reckon(operands=(3,)).rows(split, 12)]
    rows = [{"q": row["prompt"], "answer": row["answer"]} for row in drawn]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--task", f"{tmp_path / 'verify.py'}:check"),
        *("--option", f"path={tmp_path / 'data.jsonl'}", "--option", "prompt=q"),
    ]


def test_every_task_is_a_task_and_says_what_it_knows_besides(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": 2}\n')
    tasks = {
        "reckon": load("reckon"),
        "gsm8k": load("gsm8k", path=str(tmp_path)),
        "jsonl": load(str(tmp_path / "data.jsonl")),
        "given": load("given"),
    }
    for name, task in tasks.items():
        assert isinstance(task, Task) and task.name == name and task.max_new_tokens >= 1
        knows = [kind for kind in (Endless, Roles, Steps, Deciding, Walkable) if isinstance(task, kind)]
        assert len(knows) == (5 if name == "reckon" else 0), name


def test_what_is_not_said_follows_the_run(tmp_path):
    """Task, options, temperature and limit are the run's; what is said comes first; another task brings its own."""
    run, config = tmp_path / "run", {"task": "reckon", "task_options": {"operands": [3]}, "temperature": 0.5}
    (run / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    shutil.copy(model_path() / "config.json", run / "checkpoints" / "checkpoint-4")
    seal(run / "checkpoints" / "checkpoint-4")
    (run / "run.json").write_text(json.dumps({"config": config | {"max_new_tokens": 12}}))
    for named in (run, run / "checkpoints" / "checkpoint-4"):
        assert run_of(named) == run
        found = PolicyConfig(str(named)).settled()
        assert (found.task, dict(found.options)) == ("reckon", {"operands": [3]})
        assert (found.temperature, found.max_new_tokens) == (0.5, 12)
    said = PolicyConfig(str(run), temperature=2.0, options={"operands": [4]}).settled()
    assert (said.temperature, said.max_new_tokens, dict(said.options)) == (2.0, 12, {"operands": [4]})
    other = PolicyConfig(str(run), task="given").settled()
    assert other.max_new_tokens == 128 and not other.options  # half of the shipped model's context of 256
    assert run_of(tmp_path) is None and run_of("reckon") is None


@pytest.mark.parametrize(("context", "limit"), [(None, 256), (64, 32), (512, 256), (8192, 256)])
def test_the_usual_limit_leaves_room_in_the_context(context, limit):
    """A file's task allows 256 tokens."""
    assert usual_limit(load("given"), SimpleNamespace(max_position_embeddings=context)) == limit


def test_a_part_without_prompts_says_so(policy, tmp_path, capsys):
    with pytest.raises(ValueError, match="reckon has no prompts in the part that was asked for"):
        policy.encode_rows([])
    data = tmp_path / "train_only.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": 1}) + "\n" for row in Reckon().rows("train", 3))
    )
    run = tmp_path / "run"
    held_out = ["pivotality", "run", "--split", "test", "--out", str(run)]
    for command in (["evaluate"], ["score", "--out", str(tmp_path / "x")], held_out):
        assert main([*command, "--task", str(data)]) == 1
        assert "has no prompts in the part that was asked for" in capsys.readouterr().err.replace("\n", " ")
    assert not run.exists()


def test_a_settled_policy_can_be_stored_and_opened_again(policy):
    stored = json.loads(json.dumps(PolicyConfig(options={"operands": [3]}).settled().as_dict()))
    again = PolicyConfig(**stored).open()
    assert again.task == Reckon(operands=[3]) and again.max_new_tokens == policy.max_new_tokens
    assert again.ends == policy.ends == (policy.tokenizer.eos_token_id,)


def test_what_cannot_be_opened_says_what_to_do(tmp_path, chat_model):
    with pytest.raises(ValueError, match="no chat template; leave it out"):
        PolicyConfig(chat=True).open()
    with pytest.raises(ValueError, match=r"there is no device 'cuda:9' here; there are: cpu"):
        find_device("cuda:9")
    with pytest.raises(TypeError, match=r"no option 'operand'\. Did you mean 'operands'"):
        PolicyConfig(options={"operand": 3}).open()
    for wrong in ({"temperature": 0.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=r"--temperature must be|--max-new-tokens must be"):
            PolicyConfig(**wrong)
    tokenizer = load_tokenizer(chat_model)
    tokenizer.add_tokens(["the"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text((model_path() / "tokenizer.json").read_text().replace('"wait"', '"stay"'))
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, other)
    with pytest.raises(ValueError, match=r"no task is named, and .* is not a run that would tell it: name one"):
        PolicyConfig(str(other)).settled()


def test_text_prompts_are_asked_in_a_chat_where_that_is_said(chat_model):
    asked = PolicyConfig(chat_model, chat=True).open()
    plain = PolicyConfig(chat_model, chat=False).open()
    text = "7 + 3 * 4"
    assert asked.encode(text) == plain.encode([{"role": "user", "content": text}][0]["content"] + " =")
    with pytest.warns(UserWarning, match=r"--chat .* --no-chat"):
        assert encode_prompt(asked.tokenizer, text, chat=None) == plain.encode(text)
    with pytest.raises(ValueError, match="leave --no-chat out"):
        plain.encode([{"role": "user", "content": text}])


def test_completions_that_are_messages_are_read_by_what_they_say(policy):
    """A repr of the list would be scored as other tokens, without a word."""
    said = [{"role": "assistant", "content": "@1 7 + 2"}]
    assert encode_completion(policy.tokenizer, said) == encode_completion(policy.tokenizer, "@1 7 + 2") != []
    assert encode_completion(policy.tokenizer, (5, 6)) == [5, 6]
    for wrong, what in ((said * 2, "2 messages"), (7, "int"), ([{"role": "user", "content": "a"}], "1 messages")):
        with pytest.raises(ValueError, match=f"not {what}"):
            encode_completion(policy.tokenizer, wrong)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert prompt_text([*parts, *said]) == "user: a\n\nassistant: @1 7 + 2"


def test_every_score_of_the_table_is_measured(policy):
    """One number per token, finite; those that belong together agree."""
    rows = policy.task.rows("test", 3)
    prompts = policy.encode_rows(rows)
    completions = [group[0].ids for group in policy.complete(prompts, 1, seed=0)]
    names = sorted(available(policy.task))
    found = measure(policy, rows, prompts, completions, names, seed=1, batch=2)
    assert set(names) == set(SCORES) == set(found)
    for name, values in found.items():
        assert [len(x) for x in values] == [len(ids) for ids in completions], name
        assert all(torch.isfinite(x).all() for x in values), name
    for i, row in enumerate(rows):
        assert torch.allclose(found["surprisal"][i].double(), -found["logprob"][i].double(), atol=1e-5)
        assert found["oracle_positions"][i].bool().tolist() == policy.task.deciding(
            row, policy.tokenizer.convert_ids_to_tokens(list(completions[i]))
        )
        settled = ~found["oracle_positions"][i].bool()
        assert (found["exact_value"][i][settled].abs() < 0.2).all()
    with pytest.raises(ValueError, match="no score is called entrop; did you mean entropy"):
        measure(policy, rows, prompts, completions, ["entrop"])
    with pytest.raises(ValueError, match=r"exact_value .* needs a world that prefix trees can walk"):
        measure(Policy(policy.model, policy.tokenizer, load("given")), rows, prompts, completions, ["exact_value"])


def test_the_commands_take_a_task_of_one_s_own(tmp_path, own, capsys):
    """`score`, `evaluate`, `pivotality run` and `study correlation` with a verifier and a file."""
    out = tmp_path / "scores.parquet"
    limit = ("--max-new-tokens", "24")
    assert main(["score", *own, *limit, "--split", "train", "--prompts", "2", "--out", str(out)]) == 0
    assert len(pyarrow.parquet.read_table(out)) == 2
    assert main(["evaluate", *own, *limit, "--prompts", "3", "--samples", "2", "--split", "train"]) == 0
    assert "pass@1" in capsys.readouterr().out
    run = tmp_path / "pivots"
    sizes = ("--prompts", "2", "--samples", "1", "--rollouts", "2", "--split", "train")
    assert main(["pivotality", "run", *own, *limit, *sizes, "--out", str(run)]) == 0
    stored = json.loads((run / "result.json").read_text())["policy"]
    assert stored["options"]["prompt"] == "q" and stored["max_new_tokens"] == 24
    study = ("--prompts", "4", "--rollouts", "8", "--bootstraps", "20", "--condition-prompts", "4", "--temperatures")
    assert main(["study", "correlation", *own, *limit, *study, "--out", str(tmp_path / "study")]) == 0
    assert main(["score", *own, "--prompts", "1", "--out", str(out)]) == 0  # 256 tokens would not fit its context
    assert main(["score", *own[:2], "--option", "paht=x", "--out", str(out)]) == 1
    assert "needs data" in capsys.readouterr().err


def test_a_token_is_shown_as_text(tmp_path):
    """Not as the tokenizer's own entry for it."""
    out = tmp_path / "scores.parquet"
    assert main(["score", "--prompts", "2", "--out", str(out)]) == 0
    policy = PolicyConfig().open()
    for row in pyarrow.parquet.read_table(out).to_pylist():
        assert "".join(row["tokens"]) == policy.tokenizer.decode(row["completion_ids"])


def test_arguments_name_a_policy():
    from tokencredit.cli import make_parser

    words = "--model m --task t --option a=1 --option b=x --temperature 0.5 --no-chat --dtype bfloat16 --device cpu"
    found = policy_config(make_parser().parse_args(["evaluate", *words.split()]))
    assert found == PolicyConfig("m", "t", {"a": 1, "b": "x"}, 0.5, None, False, "bfloat16", "cpu")


@pytest.mark.parametrize("split, other", [("test", "train"), ("train", "test")])
def test_fewer_prompts_than_were_asked_for_are_said(tmp_path, capsys, split, other):
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "answer": n + 1}) + "\n" for n in range(40)))
    task = load(f"jsonl:{data}")
    held = len(task.rows(split))
    assert 0 < held < 40
    assert len(rows_of(Namespace(split=split, prompts=held, seed=0), task)) == held
    assert capsys.readouterr().err == ""
    assert len(rows_of(Namespace(split=split, prompts=held + 1, seed=0), task)) == held
    told = f"--prompts {held + 1}: the {split} part of {task.name} holds {held}; the rest is --split {other}"
    assert capsys.readouterr().err == f"warning: {told}\n"


def test_options_of_the_template_are_its_own_where_nobody_gives_others(tmp_path):
    tokenizer, messages = load_tokenizer(str(model_path())), [{"role": "user", "content": "3"}]
    tokenizer.chat_template = (
        "\n  {% if sign %}{{ sign }} {% endif %}\n{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    plain = {sign: tokenizer.apply_chat_template(messages, tokenize=False, sign=sign) for sign in (None, "+", "=")}
    for _ in range(2):
        set_template_options(tokenizer, {"sign": "+", "thinks": False, "tools": ["it's"]})
    tokenizer.save_pretrained(tmp_path)
    for own in (tokenizer, load_tokenizer(str(tmp_path))):
        assert own.chat_template.count("set sign") == 1
        assert own.apply_chat_template(messages, tokenize=False) == plain["+"]
        assert own.apply_chat_template(messages, tokenize=False, sign="=") == plain["="]
        assert own.apply_chat_template(messages, tokenize=False, sign=None) == plain[None]
