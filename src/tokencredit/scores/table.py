"""The table of scores: a number per token [B, T] that is measured, never signed by the outcome."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokencredit.tasks.task import Deciding, Task, Walkable

Source = Literal["forward", "importance", "siblings", "text", "draw", "task", "steps", "caller"]
SOURCES: dict[Source, str] = {
    "forward": "one forward pass",
    "importance": "an importance proxy, in one call for all tokens",
    "siblings": "a forward pass over the whole group",
    "text": "the text of the completion",
    "draw": "a random draw of its own",
    "task": "what the task knows of its completions",
    "steps": "values at the boundaries of reasoning steps, by sampling",
    "caller": "nobody here: who trains with it gives it",
}


@dataclass(frozen=True)
class ScoreKind:
    """One score: its name, what it is, in which unit, who measures it.

    falling   whether a small number is what makes a token stand out
    """

    name: str
    what: str
    unit: str
    source: Source
    falling: bool = False


SCORES: dict[str, ScoreKind] = {
    score.name: score
    for score in (
        ScoreKind("logprob", "log π of the token", "nats", "forward"),
        ScoreKind("entropy", "entropy of the distribution that sampled the token", "nats", "forward"),
        ScoreKind("sum_p2", "sum of squared probabilities, Σ p²", "1", "forward"),
        ScoreKind("varentropy", "variance of log p", "nats²", "forward"),
        ScoreKind("margin", "largest probability less the second", "1", "forward", falling=True),
        ScoreKind("surprisal", "−log π of the token", "nats", "importance"),
        ScoreKind("head_norm", "norm of the gradient of log π over the LM head", "1", "importance"),
        ScoreKind(
            "head_fisher", "trace of the Fisher information over the LM head: its diagonal's sum", "1", "importance"
        ),
        ScoreKind(
            "last_block_norm", "the same over the last block's position-local part and the head", "1", "importance"
        ),
        ScoreKind("gradient_norm", "norm of the gradient of log π over the parameters", "1", "importance"),
        ScoreKind("fisher_trace", "trace of the Fisher information of the token's distribution", "1", "importance"),
        ScoreKind("perturbation_variance", "variance of π under perturbed parameters", "1", "importance"),
        ScoreKind("attention", "attention received from later tokens, per later query", "1", "importance"),
        ScoreKind("js_divergence", "Jensen-Shannon divergence of the group's living distributions", "nats", "siblings"),
        ScoreKind("planning", "1 on tokens of phrases that plan, else 0", "0/1", "text"),
        ScoreKind("uniform", "uniform in [0, 1), of seed, step and row", "1", "draw"),
        ScoreKind("exact_value", "Q − V from the policy's own prefix trees", "reward", "task"),
        ScoreKind("oracle_positions", "1 where some choice can change the outcome, else 0", "0/1", "task"),
        ScoreKind("step_gain", "gain of the reasoning step, by Monte-Carlo values (VinePPO)", "reward", "steps"),
    )
}
UNMEASURED: dict[str, ScoreKind] = {
    score.name: score
    for score in (
        ScoreKind("implicit_reward", "log π_r − log π_ref of the token, π_r trained on preferences", "nats", "caller"),
        ScoreKind(
            "contrast", "log π⁺ − log π⁻ of two policies, trained on what is chosen and rejected", "nats", "caller"
        ),
        ScoreKind(
            "before_after", "V after the token less V before it, re-sampled (`pivotality run`)", "reward", "caller"
        ),
        ScoreKind("token_reward", "reward of the token or turn, by a verifier; may be none", "reward", "caller"),
        ScoreKind("self_reward", "log π − log π_ref of the token, π the policy that sampled", "nats", "caller"),
        ScoreKind("learned_size", "size of Q − V that a credit model expects (`credit-model fit`)", "reward", "caller"),
        ScoreKind("learned_credit", "Q − V that a credit model expects, given the outcome", "reward", "caller"),
        ScoreKind("past_pass_rate", "share of the prompt's earlier rollouts that succeeded", "1", "caller"),
        ScoreKind("prompt_confidence", "exp(mean log π) of the prompt's 20 % least likely tokens", "1", "caller"),
    )
}
"""What methods read and nobody here measures: CreditTrainer(scorers=...) takes it."""
OF_A_RUN = frozenset({"self_reward", "learned_credit", "past_pass_rate"})
"""What a training run measures besides: its first policy is the reference, it fits a credit model as it goes, and it
remembers how its prompts went.
"""
FREE = frozenset({"logprob", "entropy"})
"""What every pass over a rollout batch gives by the way."""


def names_of(*sources: Source) -> tuple[str, ...]:
    """Names of the scores of these sources, in the table's order."""
    return tuple(score.name for score in SCORES.values() if score.source in sources)


def available(task: Task | None) -> frozenset[str]:
    """Names of the scores that can be measured on a task; with None, where nothing of the task is known."""
    found = set(names_of("forward", "importance", "siblings", "text", "draw"))
    if task is not None:
        found |= {"step_gain"}
        found |= {"exact_value"} if isinstance(task, Walkable) else set()
        found |= {"oracle_positions"} if isinstance(task, Deciding) else set()
    return frozenset(found)


def check_available(names: Iterable[str], task: Task | None) -> None:
    """ValueError for a score that nobody has, with the nearest name, and for one that the task cannot give."""
    there = available(task)
    for name in names:
        if name in UNMEASURED:
            what = f"{name} ({UNMEASURED[name].what}) is measured by nobody here"
            raise ValueError(f"{what}: CreditTrainer(scorers=...) takes it; there are: {', '.join(sorted(there))}")
        if name not in SCORES:
            near = difflib.get_close_matches(name, SCORES, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"no score is called {name}{hint} There are: {', '.join(SCORES)}")
        if name not in there:
            needed = {
                "exact_value": "a world that prefix trees can walk, as reckon is",
                "oracle_positions": "a task that says which positions decide, as reckon does",
            }.get(name, "a task")
            raise ValueError(f"{name} ({SCORES[name].what}) needs {needed}; there are: {', '.join(sorted(there))}")
