"""One completion as a trainer logged it, before any tokenizer or checkpoint has been asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoggedRollout:
    """What a log says of one completion; None is what it does not say.

    prompt, completion  text, or a list of messages (dicts with "role" and "content"); "" where there are ids alone
    reward              the verifier's total; `rewards` has those of every reward function that gave one
    advantage           one number for all of its tokens, where the log has one
    turn_reward         a reward for each of the policy's turns, None where a turn has none
    group               completions of one prompt in one step share it
    prompt_ids          [P] and `completion_ids` [T], where the log has token ids
    mask                [T] True on what the policy wrote, False on tool outputs and other turns
    tokens              {name: [T]}, numbers per token, None where there is none: "advantage", "sampler_logprob",
                        "trainer_logprob", "entropy", "token_reward", …
    answer              the ground truth that the verifier saw
    others              every further column, as it was logged
    place               where it stands: file and line or row
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completion: str | Sequence[Mapping[str, Any]]
    reward: float | None
    place: str
    step: int | None = None
    group: str | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    advantage: float | None = None
    turn_reward: Sequence[float | None] | None = None
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[int] | None = None
    mask: Sequence[bool] | None = None
    tokens: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    truncated: bool | None = None
    answer: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
