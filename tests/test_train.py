"""`train`: what a run leaves behind, how it goes on after a kill or a full disk, and what it refuses. Real TRL, the
shipped model.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

from chats import chat_model_in
from tokencredit.checkpoints import COMPLETE
from tokencredit.cli import main
from tokencredit.engines import recorder
from tokencredit.engines.adaptor import make_reward, prompts_of, training_rows
from tokencredit.engines.configs import make_args
from tokencredit.engines.train import train
from tokencredit.exclusive import exclusive
from tokencredit.lm.load import load_tokenizer
from tokencredit.runs import Run, RunError
from tokencredit.tasks import VerifierError, load
from tokencredit.tasks.reckon import VOCABULARY, Reckon, model_path
from tokencredit.train_config import TrainConfig

logging.set_verbosity_error()
logging.disable_progress_bar()

TINY = {
    "prompts": 8,
    "group": 4,
    "steps": 4,
    "eval_every": 2,
    "eval_prompts": 16,
    "eval_samples": 2,
    "record_every": 1,
    "record_rows": 6,
    "save_every": 2,
    "threads": 1,
}
NEVER = {"eval_every": 0, "record_every": 0, "save_every": 0}
EVERY_STEP = (
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "pass_rate",
    "entropy",
    "length",
    "truncated",
    "clip_low",
    "clip_high",
    "credit_against_outcome",
    "credited_tokens",
    "credited_share",
    "credit_mean",
    "credit_std",
    "zero_variance_groups",
    "uncredited_groups",
    "tokens_per_second",
    "seconds",
    "seconds_generation",
    "seconds_scoring",
    "seconds_update",
)
CLOCKS = ("seconds", "tokens_per_second")


def tiny(**changes):
    return TrainConfig(**TINY | changes)


def timeless(records):
    """Records without what a clock measured."""
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and what it told while it ran."""
    told = []
    run = train(
        tiny(method="gtpo"), tmp_path_factory.mktemp("whole") / "run", command="here", listen=lambda *e: told.append(e)
    )
    return run, told


def test_a_run_records_what_it_was(whole):
    run, told = whole
    info = Run.open(run.path).info
    assert [info[k] for k in ("status", "method_name", "task", "model", "command")] == [
        "finished",
        "gtpo",
        "reckon",
        "reckon",
        "here",
    ]
    assert info["config"] == tiny(method="gtpo").as_dict() and info["method"].startswith("Method(name='gtpo'")
    events = [event for event, _ in told]
    assert (
        events[0] == "start"
        and events[-1] == "finished"
        and events.count("step") == 8
        and events.count("evaluation") == 3
    )
    heard = [figures for event, figures in told if event == "evaluating"]
    assert {f["total"] for f in heard} == {16 * 3} and max(f["done"] for f in heard) == 48, "greedy answers count"


def test_every_step_has_every_figure(whole):
    records = whole[0].metrics()
    assert [r["step"] for r in records] == list(range(1, 9))
    for record in records:
        assert not [name for name in EVERY_STEP if not isinstance(record.get(name), float)]
    assert all(
        0 < r["pass_rate"] < 1 and r["entropy"] > 0 and r["length"] > 5 and r["tokens_per_second"] > 0 for r in records
    )
    assert [r["reward"] for r in records[::2]] == [
        r["reward"] for r in records[1::2]
    ]  # two updates on each rollout batch
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(records))


def test_evaluations_are_on_held_out_prompts(whole):
    found = whole[0].evaluations()
    assert [(e["step"], e["split"]) for e in found] == [(0, "test"), (4, "test"), (8, "test")]
    for e in found:
        assert {
            "pass@1",
            "pass@2",
            "greedy",
            "entropy",
            "length",
            "truncated",
            "entropy_by_role",
            "reasons",
        } <= e.keys()
        assert e["pass@1"]["num"] == 16 and sum(e["reasons"].values()) == 32
    trained = {row["prompt"] for row in Reckon().rows("train", 32, 0)}
    assert not trained & {row["prompt"] for row in Reckon().rows("test", 16, 0)}


def test_token_records_are_aligned_and_have_roles(whole):
    run = whole[0]
    assert run.token_steps() == [0, 2, 4, 6]
    rows, task = run.tokens(2), Reckon()
    assert len(rows) == 6 and [r["group"] for r in rows] == [0, 0, 0, 0, 1, 1]
    prompts = [row["prompt"] for row in task.rows("train", 32, 0)]
    assert (
        rows[0]["prompt"] == prompts[8] and rows[4]["prompt"] == prompts[9]
    )  # the second batch of 8, in the order of the stream
    by_prompt = {row["prompt"]: row for row in task.rows("train", 32, 0)}
    for row in rows:
        verdict = task.verify(row["completion"], by_prompt[row["prompt"]], row["reason"] == "truncated")
        assert (row["success"], row["reason"], row["reward"]) == (
            verdict.correct,
            verdict.reason,
            float(verdict.correct),
        )
        words = [VOCABULARY[i] for i in row["token_ids"]]
        assert [token.strip() for token in row["tokens"]] == words and row["role"] == task.roles(
            by_prompt[row["prompt"]], words
        )
        assert len(row["entropy"]) == len(row["logprob"]) == len(row["credit"]) == len(row["tokens"])


def test_checkpoints_are_whole_and_can_be_evaluated(whole, capsys):
    run = whole[0]
    names = sorted(p.name for p in (run.path / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-8"] and all(
        (run.path / "checkpoints" / n / COMPLETE).exists() for n in names
    )
    assert main(["evaluate", "--model", str(run.path), "--prompts", "16", "--samples", "2"]) == 0
    assert "on reckon (test), 16 prompts" in capsys.readouterr().out


def test_a_finished_run_is_not_repeated(whole):
    run, told = whole[0], []
    before = (run.path / "metrics.jsonl").stat().st_mtime_ns
    assert train(tiny(method="gtpo"), run.path, listen=lambda *e: told.append(e)).status == "finished"
    assert [e for e, _ in told] == ["finished"] and (run.path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_directory_with_a_different_run_is_refused(whole, capsys):
    with pytest.raises(RunError) as caught:
        train(tiny(method="gtpo", seed=3, method_options={"alpha": (1, 0.3)}), whole[0].path)
    for part in (
        "already holds a different run",
        "config.seed: 0 in the directory, 3 asked for",
        "config.method_options.alpha:",
    ):
        assert part in str(caught.value)
    assert main(["train", "--out", str(whole[0].path)]) == 1
    assert "config.method: 'gtpo' in the directory, 'grpo' asked for" in capsys.readouterr().err
    assert Run.open(whole[0].path).status == "finished"


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, tmp_path):
    short = {"method": "gtpo", "steps": 2}
    same, other = (train(tiny(**short, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    assert timeless(same.metrics()) == timeless(whole[0].metrics())[:4]
    assert timeless(same.evaluations()) == timeless(whole[0].evaluations())[:2]
    assert timeless(other.metrics()) != timeless(same.metrics())


KILLED = """
import os, signal, sys
from tokencredit.engines.train import train
from tokencredit.train_config import TrainConfig

def listen(event, figures):
    if event == "step" and figures["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)

train(TrainConfig(**{config!r}), {out!r}, listen=listen)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path):
    """Killed after step 7 was recorded; the last whole checkpoint is that of step 4, and an unfinished one lies
    about.
    """
    out = tmp_path / "run"
    script = KILLED.format(config=tiny(method="gtpo").as_dict(), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    run = Run.open(out)
    assert run.status == "running" and [m["step"] for m in run.metrics()] == list(range(1, 8))
    (out / "checkpoints" / "checkpoint-6").mkdir()
    (out / "checkpoints" / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
    told = []
    run = train(tiny(method="gtpo"), out, listen=lambda *e: told.append(e))
    assert told[0] == ("resume", {"step": 4}) and run.status == "finished"
    assert timeless(run.metrics()) == timeless(whole[0].metrics())
    assert timeless(run.evaluations()) == timeless(whole[0].evaluations())
    seconds = [m["seconds"] for m in run.metrics()]
    assert seconds == sorted(seconds)
    for step in whole[0].token_steps():
        assert run.tokens(step) == whole[0].tokens(step)
    weights = [torch.load(r.path / "checkpoints" / "checkpoint-8" / "optimizer.pt") for r in (run, whole[0])]
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"])
        for a, b in zip(weights[0]["state"].values(), weights[1]["state"].values())
    )


@pytest.mark.parametrize(
    "seconds, share, kept",
    [(0, 1e9, [2, 4, 6]), (1e9, 1e9, [6]), (0, 0, [2, 6])],
    ids=["at once", "never", "unless writing takes long"],
)
def test_training_that_is_in_no_checkpoint_is_saved_in_between(tmp_path, monkeypatch, seconds, share, kept):
    """At the end of a rollout batch, of two steps each; `save_every` would write the last one alone."""
    monkeypatch.setattr(recorder, "UNSAVED", seconds)
    monkeypatch.setattr(recorder, "SHARE", share or 1e-12)
    config = tiny(steps=3, save_every=3, eval_every=0, record_every=0, trl={"save_total_limit": 9})
    run = train(config, tmp_path / "run")
    assert [step for step in range(1, 7) if (run.path / "checkpoints" / f"checkpoint-{step}").is_dir()] == kept


@pytest.mark.parametrize("room", [300_000, 600_000], ids=["weights", "optimizer"])
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, room):
    """Files may not grow beyond `room` bytes once step 3 is done: the weights (safetensors) or the optimizer (torch) do
    not fit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config, out = tiny(steps=2, save_every=1, eval_every=0, record_every=0), tmp_path / "run"

    def fill(event, figures):
        if event == "step" and figures["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

    try:
        with pytest.raises(
            OSError, match=r"a file could not be written \(.*run the same command again; it goes on from"
        ) as e:
            train(config, out, listen=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint checkpoint-2" in str(e.value) and Run.open(out).status == "failed"
    run = train(config, out)
    assert (
        run.status == "finished"
        and [m["step"] for m in run.metrics()] == [1, 2, 3, 4]
        and len(run.info["resumed"]) == 1
    )


def test_no_space_for_a_record_is_the_same(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log_metrics", no_space)
        with pytest.raises(OSError, match=r"No space left on device.*it goes on from the start"):
            train(tiny(steps=1, **NEVER), tmp_path / "run")
    assert train(tiny(steps=1, **NEVER), tmp_path / "run").status == "finished"


def test_one_process_writes_a_run(tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(RuntimeError, match="is being written by another process"):
        train(tiny(steps=1, **NEVER), tmp_path / "run")


def test_exact_value_uses_the_prefix_tree(tmp_path):
    run = train(
        tiny(method="exact_value", prompts=3, steps=1, task_options={"operands": [3]}, eval_every=0), tmp_path / "run"
    )
    rows = run.tokens(0)
    assert all(torch.tensor(row["exact_value"]).abs().max() <= 1 for row in rows)
    assert any(max(map(abs, row["exact_value"])) > 0.05 for row in rows)
    for row in rows:  # a copied token decides nothing, a step may
        copies = [abs(v) for v, role in zip(row["exact_value"], row["role"]) if role == "copy"]
        assert max(copies, default=0) < 0.1
        assert row["credit"] == pytest.approx(row["exact_value"], abs=1e-6)


def test_accumulated_passes_are_one_batch(tmp_path):
    one, four = (train(tiny(steps=1, **NEVER | {"accumulate": n}), tmp_path / str(n)) for n in (1, 4))
    for a, b in zip(one.metrics(), four.metrics()):
        assert (a["reward"], a["length"]) == (b["reward"], b["length"])
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_batch_goes_in_as_few_passes_as_there_is_room_for(tmp_path, monkeypatch):
    """By default; 8 rollouts a pass here, then 3 and 5, of which 2 and 4 divide the batch."""
    from tokencredit.lm.room import Room

    config = tiny(steps=1, prompts=2, group=4, **NEVER)
    found = []
    for rows in (100, 3, 5):
        monkeypatch.setattr(Room, "rows_trained", lambda self, length, written, rows=rows: rows)
        run = train(config, tmp_path / str(rows))
        [state] = [json.loads(path.read_text()) for path in run.path.glob("checkpoints/*/trainer_state.json")]
        found.append((state["train_batch_size"], run.metrics()[0]["grad_norm"]))
    assert [rows for rows, _ in found] == [8, 2, 4]
    assert [norm for _, norm in found[1:]] == pytest.approx([found[0][1]] * 2, rel=1e-3)


def test_completions_without_a_word(tmp_path):
    """Every completion is its end token alone: no reward, no credit, nothing undefined."""
    others = [i for i, word in enumerate(VOCABULARY) if word != "<eos>"]
    changes = {"trl": {"generation_kwargs": {"suppress_tokens": others}}, "steps": 1, "record_every": 1}
    run = train(tiny(**NEVER | changes), tmp_path / "run")
    assert all(
        m["length"] == 1 and m["pass_rate"] == 0 and m["zero_variance_groups"] == 1 and m["loss"] == 0
        for m in run.metrics()
    )
    assert {(row["completion"], row["reason"]) for row in run.tokens(0)} == {("", "unparsed")}


# --- tasks of one's own -----------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "<bos> 7 + 3 * 2 =", "answer": {"value": "3"}, "only_here": [1, {"a": None}]},
    {"prompt": "<bos> 8 + 4 * 2 =", "answer": "6", "missing": None},
    {"prompt": "<bos> 9 + 4 * 2 =", "answer": 7},
    {"prompt": "<bos> 9 - 4 * 2 =", "answer": 1},
    {"prompt": "<bos> 9 - 2 * 2 =", "answer": 5},
]


def write_own(folder, body, rows=ROWS):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(textwrap.dedent(body))
    path = str(folder / "rows.jsonl")
    return {"task": f"{folder}/own.py:verify", "task_options": {"path": path, "test": path}}


def test_a_verifier_of_ones_own_sees_its_rows_whole(tmp_path):
    """Arrow would give all rows the same columns and one type to each; the rows reach the verifier as they were
    written.
    """
    own = write_own(
        tmp_path,
        """
        import json
        def verify(completion, row):
            with open(__file__ + ".seen", "a") as file:
                file.write(json.dumps(row) + "\\n")
            answer = row["answer"]["value"] if isinstance(row["answer"], dict) else row["answer"]
            return completion.split()[-2:] == ["@1", str(answer)]
        """,
    )
    run = train(tiny(**own, max_new_tokens=30, steps=3, prompts=4, eval_prompts=5), tmp_path / "run")
    assert run.status == "finished" and run.tokens(0)[0]["reason"] in ("correct", "wrong")
    seen = [json.loads(line) for line in (tmp_path / "own.py.seen").read_text().splitlines()]
    for row in seen:
        original = ROWS[int(row["row_id"].rpartition(" ")[2]) - 1]
        assert {k: v for k, v in row.items() if k != "row_id"} == original
    assert {row["row_id"] for row in seen} == {f"rows.jsonl, line {i}" for i in range(1, 6)}


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "def verify(completion, row):\n    return row['nothing']",
            "verifier verify failed on rows.jsonl, line .: KeyError: 'nothing'",
        ),
        (
            "def verify(completion, row):\n    return float('nan')",
            "verifier verify failed on .* a Verdict or a bool, not float .'nan'",
        ),
    ],
)
def test_a_verifier_that_fails_names_the_row(tmp_path, capsys, body, message):
    own = write_own(tmp_path, body)
    with pytest.raises(VerifierError, match=message):
        train(tiny(**own, **NEVER | {"max_new_tokens": 8}), tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed"


def test_finite_tasks_are_used_whole_and_shuffled_by_epoch(tmp_path):
    own = write_own(tmp_path, "def verify(completion, row):\n    return True")
    task = load(own["task"], **own["task_options"])
    rows, order = training_rows(tiny(**own, steps=3, prompts=4), task)
    assert len(rows) == 5 and len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    again, other = (training_rows(tiny(**own, seed=seed, steps=3, prompts=4), task)[1] for seed in (0, 1))
    assert order == again != other
    assert (
        prompts_of(rows, order)["row"][:] == order and prompts_of(rows, order)[0]["prompt"] == rows[order[0]]["prompt"]
    )
    rows, order = training_rows(tiny(), Reckon())
    assert len(rows) == 32 and order == list(range(32)) and rows == Reckon().rows("train", 32, 0)


PARTS = (
    "{% for m in messages %}{% for p in ([m['content']] if m['content'] is string else m['content']) %}"
    "{{ (p if p is string else p['text']) + ' ' }}{% endfor %}{% endfor %}="
)


def test_messages_whose_content_is_text_and_parts_train_together(tmp_path):
    model = chat_model_in(tmp_path / "chat", PARTS)
    system, user = {"role": "system", "content": "<bos>"}, {"role": "user", "content": "7 + 3", "name": "me"}
    parts = {"role": "user", "content": [{"type": "text", "text": "8 + 3"}]}
    rows = [{"prompt": [system, each], "answer": "1"} for each in (user, parts)]
    own = write_own(tmp_path, "def verify(completion, row):\n    return True", rows)
    run = train(tiny(**own, model=str(model), **NEVER, steps=1, prompts=2, max_new_tokens=4), tmp_path / "run")
    assert run.status == "finished"
    assert [prompts_of(rows, [1, 0])[i]["prompt"] for i in (1, 0)] == [row["prompt"] for row in rows]
    with pytest.raises(ValueError, match=r"line 2: the prompt is text, and that of .*line 1 is messages: --chat"):
        rows[1]["prompt"] = "8 + 3"
        own = write_own(tmp_path, "def verify(completion, row):\n    return True", rows)
        train(tiny(**own, model=str(model), **NEVER), tmp_path / "other")


def test_gsm8k_is_read_whole(tmp_path):
    problems = [{"question": f"What is {i} and 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = TrainConfig(task="gsm8k", task_options={"path": str(tmp_path)}, steps=2, prompts=4)
    rows, order = training_rows(config, load("gsm8k", path=str(tmp_path)))
    assert len(rows) == 20 and len(set(order)) == 8 and rows[3]["answer"] == "4"


def test_the_reward_reads_a_datasets_own_columns_too():
    """As a script with CreditTrainer may have them; what Arrow filled in where a row had nothing is taken out again."""
    seen = []

    class Task:
        def verify(self, completion, row, truncated):
            seen.append((completion, row, truncated))
            return Reckon().verify(completion, row, truncated)

    tokenizer = load_tokenizer(str(model_path()))
    reward = make_reward(Task(), tokenizer)
    extra = {}
    columns = {"answer": ["3", "4"], "note": [None, "x"], "trainer_state": object(), "log_metric": print}
    ids = [[9, tokenizer.eos_token_id], [9, 9]]
    chat = [{"role": "assistant", "content": "@1 4"}]
    assert reward(["p", "q"], ["@1 3", chat], ids, log_extra=extra.__setitem__, **columns) == [1.0, 0.0]
    assert seen == [
        ("@1 3", {"prompt": "p", "answer": "3"}, False),
        ("@1 4", {"prompt": "q", "answer": "4", "note": "x"}, True),
    ]
    assert extra == {"reason": ["correct", "truncated"]}


# --- what is refused, before a directory is made ----------------------------------------------------------------------


def refusals(folder):
    """(config, part of the message)."""
    bare = folder / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(model_path() / name, bare)
    (folder / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n' * 3)
    (folder / "test.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    gsm8k = {"task": "gsm8k", "task_options": {"path": str(folder)}}
    (folder / "gap.jsonl").write_text('{"prompt": "1", "answer": "1"}\n{"prompt": "2"}\n')
    long = [{"prompt": "<bos> " + "7 + " * n + "7 =", "answer": "1"} for n in (1, 2, 120)]
    own = write_own(folder, "def verify(completion, row):\n    return True", long)
    return [
        (tiny(model=str(folder / "gone")), "no such model"),
        (tiny(method="exact_value", **gsm8k), "exact_value .* needs a world that prefix trees can walk"),
        (tiny(task="rekcon"), "Did you mean 'reckon'"),
        (tiny(method="gtop"), 'Did you mean "gtpo"'),
        (tiny(model=str(bare)), "has no tokenizer that can be loaded; save the model's tokenizer beside it"),
        (tiny(task=str(folder / "gap.jsonl"), **NEVER), "gap.jsonl.*line 2: no answer"),
        (
            tiny(**own, **NEVER),
            r"row 2 \(rows.jsonl, line 3\): the prompt has 243 tokens and 128 may be written",
        ),
        (
            tiny(**own, **NEVER, max_new_tokens=14),
            r"row 2 \(rows.jsonl, line 3\): the prompt has 243 tokens and 14 may be written",
        ),
        (tiny(trl={"num_generations": 3}), "trl.num_generations is decided by group: set that instead"),
        (tiny(trl={"warmup_step": 3}), "no option warmup_step; did you mean warmup_steps?"),
        (tiny(trl={"epsilon": 0.5}), 'method "grpo" cannot honour'),
        (tiny(task_options={"operand": [3]}), "has no option 'operand'. Did you mean 'operands'"),
    ]


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    cases = refusals(tmp_path)

    def never(*_, **__):
        raise AssertionError("the model was loaded")

    for config, message in cases:
        with monkeypatch.context() as patched:
            if "honour" not in message:
                patched.setattr("tokencredit.engines.train.read_model", never)
            with pytest.raises((ValueError, KeyError, TypeError), match=message):
                train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists(), message


def test_a_state_that_cannot_be_cut_back_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    class Recurrent:
        pass

    monkeypatch.setattr("tokencredit.lm.key_values.DynamicCache", lambda config: SimpleNamespace(layers=[Recurrent()]))
    for config, message in (
        (tiny(), r"cannot be cut back to a prefix \(Recurrent\).*: set eval_every=0"),
        (tiny(method="vineppo", **NEVER), r"cannot be cut back to a prefix \(Recurrent\).* attention layers only$"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    assert train(tiny(steps=1, **NEVER), tmp_path / "run").status == "finished"


def test_what_several_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="1 prompts x 3 rollouts do not split into 1 passes of 2 processes"):
        train(tiny(prompts=1, group=3), tmp_path / "run")


def test_options_of_trl_are_passed_on(tmp_path):
    args = make_args(tiny(trl={"warmup_steps": 3, "beta": 0.1}, accumulate=2, minibatches=4), 48, tmp_path)
    assert (args.warmup_steps, args.beta, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (
        3,
        0.1,
        4,
        2,
    )
    assert (args.steps_per_generation, args.max_steps, args.save_steps) == (8, 32, 16)
