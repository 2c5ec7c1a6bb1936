"""Writes the same four rollouts in every layout that `tokencredit.logs` reads: `python tests/data/logs/make.py`.

Keys, their order, nesting and file names are those of each writer, which FORMATS cites. Two prompts of the embedded
world, two completions each, at one step (verl's at two, of which the second is the larger in number and the smaller in
the alphabet).
"""

import json
import math
import sys
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet

from tokencredit.lm.policy import PolicyConfig
from tokencredit.runs import Run

STEP = 3


def rollouts():
    """[{prompt, answer, ids of prompt and completion, text, reward, group}] sampled from the shipped policy."""
    policy = PolicyConfig().open()
    rows = policy.task.rows("test", 2, 0)
    prompts = policy.encode_rows(rows)
    found = []
    for g, group in enumerate(policy.complete(prompts, 2, seed=5)):
        for completion in group:
            reward = float(policy.verdict(completion.ids, rows[g], completion.truncated).correct)
            found.append(
                {
                    "prompt": rows[g]["prompt"],
                    "answer": str(rows[g]["answer"]),
                    "prompt_ids": list(prompts[g]),
                    "ids": list(completion.ids),
                    "text": policy.text(completion.ids),
                    "tokens": policy.tokens(completion.ids),
                    "reward": reward,
                    "group": g,
                }
            )
    return found


def per_token(r, kind):
    """Numbers that differ by kind, rollout and token, and are finite."""
    start = {"inference": -0.5, "trainer": -0.625, "entropy": 0.25, "credit": 1.0}[kind]
    return [start - k / 64 for k in range(len(r["ids"]))]


def lines(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")


def chat(text, role="user"):
    return [{"role": role, "content": text}]


def verl(folder, found):
    for step in (10, 2):
        rows = [
            {"input": r["prompt"], "output": r["text"], "gts": r["answer"], "score": r["reward"], "step": step}
            | {"acc": r["reward"] == 1.0, "format_score": 0.5, "pred": r["text"][-1:], "request_id": f"r{i}"}
            for i, r in enumerate(found)
        ]
        lines(folder / f"{step}.jsonl", rows, ensure_ascii=False)


def verl_task(folder, found):
    """The training parquet of verl's data preprocessing: one row per prompt."""
    rows = [
        {
            "data_source": "reckon",
            "prompt": chat(r["prompt"]),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": r["answer"]},
            "extra_info": {"split": "train", "index": i},
        }
        for i, r in enumerate(found[::2])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")


def trl_table(folder, prompts, completions, found, **more):
    table = {
        "step": [STEP] * len(found),
        "prompt": prompts,
        "completion": completions,
        "correct": [r["reward"] for r in found],
        "brief": [math.nan, *[0.25] * (len(found) - 1)],
        **more,
        "advantage": [(-1.0) ** i for i in range(len(found))],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(table).to_parquet(folder / f"completions_{STEP:05d}.parquet")


def trl(folder, found):
    trl_table(folder, [r["prompt"] for r in found], [r["text"] for r in found], found, reason=["?"] * len(found))


def trl_credit(folder, found):
    """As `CreditTrainer` writes it: with the ids and the numbers of each token."""
    more = {"completion_ids": [r["ids"] for r in found], "credit": [per_token(r, "credit") for r in found]}
    more |= {"entropy": [per_token(r, "entropy") for r in found]}
    trl_table(folder, [r["prompt"] for r in found], [r["text"] for r in found], found, **more)


def trl_chat(folder, found):
    prompts = [chat(r["prompt"]) for r in found]
    trl_table(folder, prompts, [chat(r["text"], "assistant") for r in found], found)


def prime_tokens(folder, found):
    """Prompt and completion in one sequence, with one reward at every token."""
    rows = []
    for i, r in enumerate(found):
        before = len(r["prompt_ids"])
        whole = [*r["prompt_ids"], *r["ids"]]
        num = len(whole)
        rows.append(
            {"schema_version": 1, "step": STEP, "export_step": STEP, "rank": 0, "micro_step": 0}
            | {"micro_sequence_idx": i, "export_sequence_idx": i, "run_id": None, "env_name": "reckon"}
            | {"token_ids": whole, "position_ids": list(range(num))}
            | {"loss_mask": [False] * before + [True] * len(r["ids"])}
            | {"advantages": [None] * before + per_token(r, "credit"), "losses": [{} for _ in whole]}
            | {"rewards": [r["reward"]] * num, "inference_logprobs": [0.0] * before + per_token(r, "inference")}
            | {"trainer_logprobs": [-9.0] * before + per_token(r, "trainer")}
            | {"entropy": [0.0] * before + per_token(r, "entropy"), "mismatch_kl": [None] * num}
            | {"is_masked": [None] * before + [False] * len(r["ids"])}
        )
    lines(folder / "token_exports" / f"step_{STEP}" / "rank_0.jsonl", rows, separators=(",", ":"), allow_nan=False)


def prime_rollouts(folder, found):
    rows = [
        {"example_id": r["group"], "prompt": chat(r["prompt"]), "completion": chat(r["text"], "assistant")}
        | {"answer": r["answer"], "reward": r["reward"], "timing": {}, "is_completed": True, "is_truncated": False}
        | {"stop_condition": "done", "metrics": {"correct": r["reward"]}, "correct": r["reward"]}
        for r in found
    ]
    lines(folder / "rollouts" / f"step_{STEP}" / "train_rollouts.jsonl", rows)


def prime_traces(folder, found):
    """Episodes of one trace, and the trainer's updates of them beside."""
    episodes, updates = [], []
    for i, r in enumerate(found):
        ask, say = len(r["prompt_ids"]), len(r["ids"])
        nodes = [
            {"message": chat(r["prompt"])[0], "sampled": False, "token_ids": r["prompt_ids"], "mask": [False] * ask}
            | {"logprobs": []},
            {"parent": 0, "message": chat(r["text"], "assistant")[0], "sampled": True, "token_ids": r["ids"]}
            | {"mask": [True] * say, "logprobs": per_token(r, "inference"), "finish_reason": "stop"},
        ]
        trace = {"version": 1, "id": f"t{i}", "task": {"type": "Task", "data": {"answer": r["answer"]}}, "nodes": nodes}
        trace |= {"rewards": {"correct": {"score": r["reward"], "weight": 1.0}}, "info": {"kind": "train"}}
        trace |= {"stop_condition": "agent_completed", "is_completed": True, "ok": True, "errors": []}
        work = {"type": "train", "work": {"type": "train", "step": STEP}, "id": "run"}
        episodes.append({"id": f"e{i}", "group": {"id": f"g{r['group']}"}, "run": work, "ok": True, "traces": [trace]})
        streams = {"trainer_logprobs": [None] * ask + per_token(r, "trainer")}
        streams |= {"entropies": [None] * ask + per_token(r, "entropy")}
        updates.append({"version": 1, "trace_id": f"t{i}", "info": {}, "branches": [{"index": 0, **streams}]})
        updates[-1]["branches"][0]["advantages"] = [0.0] * ask + per_token(r, "credit")
    top = folder / "traces" / f"step_{STEP}" / "train"
    lines(top / "traces.jsonl", episodes, separators=(",", ":"))
    lines(top / "annotations" / "trainer.jsonl", updates, separators=(",", ":"), allow_nan=False)


def open_instruct(folder, found):
    rows = [
        {"step": STEP, "sample_idx": i, "prompt_idx": r["group"], "prompt_tokens": r["prompt_ids"]}
        | {"response_tokens": r["ids"], "reward": r["reward"], "advantage": (-1.0) ** i, "finish_reason": "stop"}
        | {"dataset": "reckon", "ground_truth": r["answer"], "request_info": None}
        | {"logprobs": per_token(r, "inference")}
        for i, r in enumerate(found)
    ]
    lines(folder / "exp_rollouts_000000.jsonl", rows)
    about = {"run_name": "exp", "git_commit": "0", "model_name": "reckon", "timestamp": "2026-11-29T00:00:00+00:00"}
    lines(folder / "exp_metadata.jsonl", [about])


def run(folder, found):
    names = {"name": "sample", "method": "Method()", "method_name": "grpo", "task": "reckon", "model": "reckon"}
    made = Run.create(folder, **names, config={}, seed=0, command="tokencredit train")
    rows = [
        {"group": r["group"], "prompt": r["prompt"], "completion": r["text"], "reward": r["reward"]}
        | {"success": r["reward"] > 0, "reason": "?", "token_ids": r["ids"], "tokens": r["tokens"]}
        | {"credit": per_token(r, "credit"), "entropy": per_token(r, "entropy")}
        | {"logprob": per_token(r, "inference")}
        for r in found
    ]
    made.write_tokens(STEP, rows)
    (folder / "run.json").write_text(json.dumps({"kind": "training", "format": 1, "status": "finished"}))


def pivotality(folder, found):
    traces, tokens = [], []
    for k, r in enumerate(found):
        row = json.dumps({"prompt": r["prompt"], "answer": r["answer"]})
        traces.append(
            {"trace": k, "digest": f"{k:032x}", "row": row, "prompt_ids": r["prompt_ids"], "completion_ids": r["ids"]}
            | {"reward": r["reward"], "reason": "?", "truncated": False, "start": 0.5, "start_standard_error": 0.1}
            | {"rollouts": 8, "generated": 80}
        )
        tokens += [
            {"trace": k, "position": i, "token_id": r["ids"][i], "token": r["tokens"][i], "rollouts": 8}
            | {"probability": math.exp(-0.5), "entropy": per_token(r, "entropy")[i], "before_after": x}
            | {"replace": None, "chosen": True}
            for i, x in enumerate(per_token(r, "credit"))
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("traces", traces), ("tokens", tokens)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{name}.parquet")


def text(folder, found):
    rows = [{"prompt": r["prompt"], "completion": r["text"], "score": r["reward"], "global_step": STEP} for r in found]
    lines(folder / "any.jsonl", rows)


def chat_file(folder, found):
    rows = [
        {"messages": chat(r["prompt"]) + chat(r["text"], "assistant"), "reward": r["reward"], "step": STEP}
        for r in found
    ]
    lines(folder / "any.jsonl", rows)


def ids(folder, found):
    rows = [
        {"prompt_ids": r["prompt_ids"], "completion_ids": r["ids"], "reward": r["reward"], "step": STEP}
        | {"group": f"g{r['group']}", "logprobs": per_token(r, "inference"), "entropy": per_token(r, "entropy")}
        for r in found
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "any.parquet")


LAYOUTS = {
    "verl": verl,
    "verl_task": verl_task,
    "trl": trl,
    "trl_credit": trl_credit,
    "trl_chat": trl_chat,
    "prime_tokens": prime_tokens,
    "prime_rollouts": prime_rollouts,
    "prime_traces": prime_traces,
    "open_instruct": open_instruct,
    "run": run,
    "pivotality": pivotality,
    "text": text,
    "chat": chat_file,
    "ids": ids,
}


def main(top: Path) -> None:
    found = rollouts()
    for name, write in LAYOUTS.items():
        write(top / name, found)
    lines(top / "rollouts.jsonl", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
