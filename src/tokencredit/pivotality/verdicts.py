"""What the verifier says of completions, as rewards: of one, of a trace itself, of all that was sampled of a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokencredit.lm.sampling import Trace
from tokencredit.tasks.verdict import Verdict, VerifierError, to_verdict

CHECK_EVERY = 64  # every so many rollouts are verified twice

Judge = Callable[[int, tuple[int, ...], bool], Any]
"""(number of the trace, completion token ids, truncated) -> Verdict, bool, or a reward in [0, 1]."""


def judged(judge: Judge, trace: int, ids: tuple[int, ...], truncated: bool) -> tuple[float, str]:
    """(reward in [0, 1], reason). A verifier that raises is a VerifierError naming the trace."""
    try:
        result = judge(trace, ids, truncated)
    except VerifierError:
        raise
    except Exception as error:
        raise VerifierError(
            f"the verifier failed on a completion of trace {trace}: {type(error).__name__}: {error}", {}
        ) from error
    if isinstance(result, float | int) and not isinstance(result, bool):
        if not 0 <= result <= 1:
            raise ValueError(
                f"the verifier gave the reward {result} (trace {trace}); pivotality needs rewards between 0 and 1"
            )
        return float(result), "correct" if result == 1 else "wrong"
    verdict: Verdict = to_verdict(result)
    return float(verdict.correct), verdict.reason


def own_reward(judge: Judge, k: int, trace: Trace, ends: Sequence[int]) -> tuple[float, str]:
    """(reward, reason) of a trace itself. ValueError where the verifier answers differently the second time."""
    truncated = trace.completion[-1] not in ends
    answers = [judged(judge, k, trace.completion, truncated) for _ in range(3)]
    if len(set(answers)) > 1:
        raise ValueError(
            f"the verifier gave {answers} to the same completion (trace {k}): pivotality needs one that is"
            " deterministic"
        )
    return answers[0]


def judged_all(judge: Judge, k: int, completions: Sequence[tuple[tuple[int, ...], bool]]) -> list[tuple[float, str]]:
    """(reward, reason) of completions of trace k, each with whether it was truncated. ValueError where the verifier
    answers differently the second time.
    """
    found = []
    for number, (ids, truncated) in enumerate(completions):
        found.append(judged(judge, k, ids, truncated))
        if number % CHECK_EVERY == 0 and judged(judge, k, ids, truncated) != found[-1]:
            raise ValueError(
                "the verifier gave two answers to the same completion: pivotality needs one that is deterministic "
                f"(trace {k}, {len(ids)} tokens)"
            )
    return found
