"""VinePPO's credit: what each reasoning step gained, by Monte-Carlo values at the steps' boundaries.

    V̂(s) = 1/K Σⱼ R(completion j of s)        Aₖ = V̂(sₖ₊₁) − V̂(sₖ)        A_last = R − V̂(s_last)

sₖ is the prompt and all steps before the k-th; every token of a step gets its Aₖ, so a rollout's step gains add up to R
− V̂(prompt). The completions of a prefix have the length that is left, and equal prefixes share theirs. Source: VinePPO
(arXiv:2410.01679) with K = 9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokencredit.lm.distribution import seed_of
from tokencredit.lm.packing import Ids
from tokencredit.lm.policy import Policy
from tokencredit.lm.prefix_sampler import ROWS
from tokencredit.lm.sampling import Request, Sampler, Trace
from tokencredit.pivotality.tree import on_text
from tokencredit.tasks.task import Row, Steps

ROLLOUTS = 9
Judge = Callable[[int, tuple[int, ...], bool], float]
"""(index of the trace, completion token ids, truncated) -> reward."""


def step_values(
    sampler: Sampler,
    traces: Sequence[Trace],
    starts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    max_new_tokens: int,
    num: int = ROLLOUTS,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> list[list[float]]:
    """V̂ of every trace at each of its `starts` (numbers of completion tokens), from `num` rollouts of each distinct
    prefix.

    labels   for each trace, what its rewards depend on besides its tokens (the task's row): prefixes with another label
             are other prefixes
    """
    labels = [""] * len(traces) if labels is None else labels
    first: dict[tuple[object, ...], int] = {}
    requests: list[Request] = []
    total: list[float] = []
    for k, (trace, label) in enumerate(zip(traces, labels)):
        for start in starts[k]:
            name = (label, trace.prompt, trace.completion[:start])
            if name not in first:
                first[name] = len(total)
                total.append(0.0)
                source = str(name).encode()
                requests += [Request(k, start, max_new_tokens - start, seed_of(seed, source, j)) for j in range(num)]
    rewards: dict[tuple[object, ...], float] = {}
    for index, rollout in sampler.continue_(traces, requests):
        k, start = requests[index].trace, requests[index].prefix
        ids = traces[k].completion[:start] + rollout.ids
        said = (labels[k], traces[k].prompt, ids, rollout.truncated)
        if said not in rewards:
            rewards[said] = judge(k, ids, rollout.truncated)
        total[index // num] += rewards[said]
    return [
        [total[first[label, t.prompt, t.completion[:start]]] / num for start in some]
        for t, label, some in zip(traces, labels, starts)
    ]


def spread(values: Sequence[float], starts: Sequence[int], reward: float, length: int) -> list[float]:
    """The gain of the step that each of `length` tokens belongs to."""
    ends, found = [*values[1:], reward], [0.0] * length
    for value, after, start, end in zip(values, ends, starts, [*starts[1:], length]):
        found[start:end] = [after - value] * (end - start)
    return found


def line_starts(texts: Sequence[str]) -> list[int]:
    """Where the steps of a text begin: at its first token, and at the first token with something to read after a
    newline.
    """
    starts, broken, written = [0], False, False
    for i, text in enumerate(texts):
        if broken and text.strip():
            starts.append(i)
            broken = written = False
        written = written or bool(text.strip())
        broken = broken or (written and "\n" in text)
    return starts


def step_gains(
    policy: Policy,
    rows: Sequence[Row],
    prompts: Ids,
    completions: Ids,
    *,
    num: int = ROLLOUTS,
    batch: int = ROWS,
    seed: int = 0,
) -> list[list[float]]:
    """The gain of the step that every token of every completion belongs to; `rows` are the task's, one per completion.

    A task says where steps begin (`tasks.task.Steps`); without it every line is one. The end token is of the last step.
    """
    traces = [Trace(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, completions)]
    verify = [on_text(policy.task.verify, policy.tokenizer, row) for row in rows]
    starts = [_starts(policy, row, trace.completion) for row, trace in zip(rows, traces)]
    values = step_values(
        policy.sampler(batch),
        traces,
        starts,
        lambda k, ids, cut: verify[k](list(ids), cut),
        max_new_tokens=policy.max_new_tokens,
        num=num,
        seed=seed,
        labels=[repr(row) for row in rows],
    )
    gains = []
    for check, trace, value, start in zip(verify, traces, values, starts):
        ids = list(trace.completion)
        gains.append(spread(value, start, check(ids, ids[-1] not in policy.ends), len(ids)) if ids else [])
    return gains


def _starts(policy: Policy, row: Row, ids: Sequence[int]) -> list[int]:
    """0 and the further starts of steps; none where the rollout is empty, and none at its end token."""
    if not ids:
        return []
    if isinstance(policy.task, Steps):
        found = policy.task.steps(row, policy.tokenizer.convert_ids_to_tokens(list(ids)))
    else:
        found = line_starts(policy.tokens(ids))
    last = len(ids) - (ids[-1] in policy.ends)
    return sorted({0} | {i for i in found if 0 < i < last})
