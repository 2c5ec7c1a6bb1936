"""A row of what a trainer writes -> `LoggedRollout`, where the layout is more than columns with plain names."""

from __future__ import annotations

import json
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokencredit.durable import read_rows
from tokencredit.logs.files import LogRow, Place
from tokencredit.logs.readers import build, is_number, texts
from tokencredit.logs.rollout import LoggedRollout
from tokencredit.logs.values import finite, flags, ids, is_numbers, number

TRL = ("step", "prompt", "completion", "advantage")
"""The columns of TRL's table that are no reward function's."""


def read_verl(row: LogRow, place: Place) -> LoggedRollout:
    """verl's dump: texts decoded without special tokens; every further number is a reward's."""
    return build(row, place, *texts(row, place, "input", "output"), ("input", "output"), scalars=True)


def read_trl(row: LogRow, place: Place) -> LoggedRollout:
    """TRL's table of completions: a column per reward function, NaN where one does not apply. Their sum is the reward,
    since the table has no weights.
    """
    rewards = {name: number(row, name, place) for name, x in row.items() if name not in TRL and is_number(x)}
    rest = {name: value for name, value in row.items() if name not in rewards}
    found = build(rest, place, *texts(row, place), ("prompt", "completion"))
    given = [x for x in rewards.values() if x is not None]
    return _with(found, rewards=rewards, reward=sum(given) if given else None)


def same_table(before: Path, path: Path) -> bool:
    """Whether two tables of TRL's hold the same completions: it writes its last table again at every log, also where no
    new ones were sampled.
    """
    import pyarrow.parquet

    names = ["prompt", "completion"]
    with pyarrow.parquet.ParquetFile(before) as one, pyarrow.parquet.ParquetFile(path) as other:
        if one.metadata.num_rows != other.metadata.num_rows:
            return False
        return bool(one.read(names).equals(other.read(names)))


def read_run(row: LogRow, place: Place) -> LoggedRollout:
    """A run directory's `tokens/step_*.parquet`."""
    return build(row, place, row["prompt"], row["completion"], ("prompt", "completion"))


def read_prime_tokens(row: LogRow, place: Place) -> LoggedRollout:
    """prime-rl's token export: one sequence of prompt and completion, which begins where the loss does. A reward that
    is the same at every token is the rollout's.
    """
    whole, mask = ids(row, "token_ids", place), flags(row, "loss_mask", place)
    if whole is None or len(mask) != len(whole) or True not in mask:
        raise ValueError(f"{place}: 'loss_mask' has {len(mask)} values, {sum(mask)} of them on, for 'token_ids'")
    start = mask.index(True)
    own = {name: x[start:] if isinstance(x, list) and len(x) == len(whole) else x for name, x in row.items()}
    rewards = own.pop("rewards", None)
    lists = {name: own.pop(name) for name in ("position_ids", "losses") if name in own}
    if is_numbers(rewards):
        trained = {x for x, on in zip(rewards, mask[start:]) if on and x is not None}
        own |= {"reward": trained.pop()} if len(trained) == 1 else {"token_reward": rewards} if trained else {}
    found = build({**own, "prompt_ids": whole[:start]}, place, "", "")
    return _with(found, others={**found.others, **lists})


def read_prime_rollout(row: LogRow, place: Place) -> LoggedRollout:
    """prime-rl's saved rollouts as `verifiers` writes them: messages, and the metrics of the reward functions."""
    metrics = row.get("metrics") or {}
    rewards = {name: float(x) for name, x in metrics.items() if is_number(x) and math.isfinite(x)}
    return _with(build(row, place, *texts(row, place), ("prompt", "completion", *rewards)), rewards=rewards)


def read_prime_traces(row: LogRow, place: Place) -> list[LoggedRollout]:
    """prime-rl's traces: an episode's traces, or one trace; every branch of its graph of messages is a rollout."""
    traces: list[dict[str, Any]] = row["traces"] if isinstance(row.get("traces"), list) else [row]
    return [_branch(row, trace, path, place) for trace in traces for path in branches(trace["nodes"])]


def branches(nodes: list[dict[str, Any]]) -> list[list[int]]:
    """Nodes from the root to each leaf, in the order of the leaves."""
    parents = {node.get("parent") for node in nodes}
    found = []
    for leaf in (i for i in range(len(nodes)) if i not in parents):
        path = [leaf]
        while (parent := nodes[path[-1]].get("parent")) is not None and parent not in path:
            path.append(parent)
        found.append(path[::-1])
    return [path for path in found if any(nodes[i].get("sampled") for i in path)]


STREAMS = {"sampler_logprob": "logprobs", "advantage": "advantages"}
UPDATES = {"trainer_logprob": "trainer_logprobs", "entropy": "entropies", "advantage": "advantages"}


def _branch(row: LogRow, trace: dict[str, Any], path: list[int], place: Place) -> LoggedRollout:
    nodes = [trace["nodes"][i] for i in path]
    first = next(i for i, node in enumerate(nodes) if node.get("sampled"))
    token_ids = [x for node in nodes for x in node.get("token_ids") or []]
    mask = [bool(x) for node in nodes for x in node.get("mask") or []]
    rewards = {name: _reward(x) for name, x in (trace.get("rewards") or {}).items()}
    given = [x for x in rewards.values() if x is not None]
    info = trace.get("info") or {}
    work = ((row.get("run") or {}).get("work") or {}).get("step")
    group = (row.get("group") or {}).get("id") if isinstance(row.get("group"), dict) else None
    flat: LogRow = {
        "reward": sum(given) if given else trace.get("reward"),
        "step": (info.get("ship") or {}).get("step", work),
        "group": group,
        "advantage": info.get("advantage"),
        "finish_reason": nodes[-1].get("finish_reason"),
    }
    if token_ids and len(mask) == len(token_ids) and True in mask:
        start = mask.index(True)
        streams = {name: _spread(nodes, key) for name, key in (STREAMS | UPDATES).items()}
        leaf = branches(trace["nodes"]).index(path)
        for update in _annotations(place.file.parent).get(str(trace.get("id")), {}).get(leaf, []):
            streams |= {name: update[key] for name, key in UPDATES.items() if len(update.get(key) or []) == len(mask)}
        flat |= {name: values[start:] for name, values in streams.items() if values is not None}
        flat |= {"prompt_ids": token_ids[:start], "completion_ids": token_ids[start:], "mask": mask[start:]}
    messages = [node["message"] for node in nodes]
    found = build({k: v for k, v in flat.items() if v is not None}, place, messages[:first], messages[first:])
    answer = ((trace.get("task") or {}).get("data") or trace.get("task") or {}).get("answer")
    others = {name: trace[name] for name in ("id", "stop_condition", "metrics", "info", "errors") if trace.get(name)}
    return _with(found, rewards=rewards, answer=answer, others={**found.others, **others})


def _reward(value: Any) -> float | None:
    """A named reward: a number, or {"score", "weight"}."""
    if isinstance(value, dict):
        return None if value.get("score") is None else value["score"] * value.get("weight", 1.0)
    return None if value is None else float(value)


def _spread(nodes: list[dict[str, Any]], key: str) -> list[float | None] | None:
    """Numbers of the sampled tokens of each node, at their places among all tokens; None where no node has any."""
    if not any(node.get(key) for node in nodes):
        return None
    spread: list[float | None] = []
    for node in nodes:
        own = iter(node.get(key) or [])
        spread += [next(own, None) if on else None for on in node.get("mask") or []]
    return spread


@lru_cache(maxsize=1)
def _annotations(folder: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """{trace: {branch: updates}} of what trainer and orchestrator wrote beside the traces."""
    from tokencredit.logs.files import rows

    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for path in sorted((folder / "annotations").glob("*.jsonl")):
        for _, update in rows(path):
            for branch in update.get("branches") or []:
                found.setdefault(str(update.get("trace_id")), {}).setdefault(branch["index"], []).append(branch)
    return found


def read_open_instruct(row: LogRow, place: Place) -> LoggedRollout:
    """open-instruct's saved rollouts: ids, the sampler's log-probs, one advantage. Tool outputs stand among the
    response's tokens, and the log does not say which they are.
    """
    if (row.get("request_info") or {}).get("num_calls"):
        warnings.warn(
            f"{place.file}: completions have tool outputs among their tokens, and open-instruct does not log which:"
            " they are not masked",
            stacklevel=3,
        )
    return build(row, place, "", "")


def read_pivotality(row: LogRow, place: Place) -> LoggedRollout:
    """The traces of `tokencredit pivotality run`, with the effects of their tokens."""
    task = json.loads(row["row"])
    found = build({**row, "group": None}, place, task.get("prompt", ""), "", ("row", "trace", "digest"))
    tokens = _effects(place.file.parent).get(row["trace"], {})
    return _with(found, answer=task.get("answer"), tokens=dict(found.tokens) | tokens)


@lru_cache(maxsize=1)
def _effects(folder: Path) -> dict[int, dict[str, list[float | None]]]:
    """{trace: {estimand: [T]}} of the tokens' table."""
    if not (folder / "tokens.parquet").exists():
        return {}
    found: dict[int, dict[str, list[float | None]]] = {}
    for row in sorted(read_rows(folder / "tokens.parquet"), key=lambda row: (row["trace"], row["position"])):
        own = found.setdefault(row["trace"], {})
        for name, value in row.items():
            if isinstance(value, float | None) and not isinstance(value, bool) and name != "token":
                own.setdefault(name, []).append(*finite([value]))
    return found


def _with(rollout: LoggedRollout, **fields: Any) -> LoggedRollout:
    return LoggedRollout(**{**vars(rollout), **fields})
