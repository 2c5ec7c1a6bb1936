"""The rollouts that are looked at closely: with the checkpoint's token ids where there is a checkpoint, else as the log
has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.policy import Policy
from tokencredit.lm.prompts import prompt_text
from tokencredit.logs import Encoded, LoggedRollout, encode
from tokencredit.masked import pool, zero_off
from tokencredit.rollouts import Rollouts
from tokencredit.studies.inspect.survey import group_number

WORDS = re.compile(r"\s*\S+|\s+$")


@dataclass(frozen=True, eq=False)
class LoggedStep:
    """Rollouts of one step [B] that have a reward.

    encoded   their ids, masks and groups; without a checkpoint the ids are the log's, or words are counted
    prompts   to read; pieces: what every token adds to the completion's text
    scores    {name: [B, T]} that the checkpoint measured: logprob and entropy; none without one
    """

    step: int
    encoded: Encoded
    prompts: tuple[str, ...]
    pieces: tuple[list[str], ...]
    success_above: float
    scores: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.encoded)

    @cached_property
    def mask(self) -> Tensor:
        """[B, T] bool: what the policy wrote."""
        return self.encoded.padded(self.encoded.mask, False)

    @cached_property
    def rollouts(self) -> Rollouts:
        """Rewards, groups, and every score that is known of all tokens: the log's, before the checkpoint's."""
        known = {name: x for name in ("entropy", "logprob") if (x := self.logged(name)) is not None}
        return Rollouts(
            reward=torch.tensor([each.reward for each in self.encoded.logged], dtype=torch.float64),
            group=torch.tensor(self.encoded.group, dtype=torch.long),
            mask=self.mask,
            scores={**self.scores, **known},
            success_above=self.success_above,
        )

    def logged(self, name: str) -> Tensor | None:
        """[B, T], 0 off the mask: what the log says of every token; None where it does not of some."""
        return self._whole(self.encoded.tokens({"logprob": "sampler_logprob"}.get(name, name)))

    @cached_property
    def credit(self) -> Tensor | None:
        """[B, T]: the logged advantages, a rollout's on every token of it; None where some token has none."""
        found = self.encoded.credit()
        return None if found is None else self._whole(found)

    def _whole(self, values: Tensor) -> Tensor | None:
        found = zero_off(values.double(), self.mask)
        return found if bool(torch.isfinite(found).all()) else None

    @cached_property
    def truncated(self) -> list[bool | None]:
        """[B]: cut off, as the log says; None where it does not."""
        return [each.truncated for each in self.encoded.logged]

    @property
    def num_prompts(self) -> int:
        return len(set(self.encoded.group))


def step_of_rollouts(
    step: int,
    logged: Sequence[LoggedRollout],
    policy: Policy | None,
    *,
    success_above: float = 0.0,
    limit: int | None = None,
) -> LoggedStep:
    """The rollouts that have a reward. limit: tokens that a completion could have.

    ValueError where the log is of another tokenizer.
    """
    some = [each for each in logged if each.reward is not None]
    if policy is None:
        words = [_words(each) for each in some]
        prompts = tuple(prompt_text(each.prompt) for each in some)
        return LoggedStep(step, _counted(some, words), prompts, tuple(words), success_above, {})
    found = encode(some, policy.tokenizer, chat=policy.chat, limit=limit, ends=policy.ends)
    encoded = _written(found, policy)
    pieces = tuple(policy.tokens(ids) for ids in encoded.completion_ids)
    shown = (prompt_text(each.prompt) or policy.text(ids) for each, ids in zip(encoded.logged, encoded.prompt_ids))
    return LoggedStep(step, encoded, tuple(shown), pieces, success_above, {})


def measure_scores(policy: Policy, step: LoggedStep, names: Sequence[str]) -> dict[str, Tensor]:
    """{name: [B, T]} of scores that the checkpoint measures of the tokens, 0 off the mask."""
    from tokencredit.scores.measure import measure

    if not names or not len(step):
        return {}
    encoded = step.encoded
    found = measure(policy, [], encoded.prompt_ids, encoded.completion_ids, list(names), batch=32)
    return {name: zero_off(encoded.padded(values).double(), step.mask) for name, values in found.items()}


def _written(encoded: Encoded, policy: Policy) -> Encoded:
    """Those of which the policy wrote a token, behind a prompt that has one, and that its context holds; what is left
    out is noted.
    """
    context = getattr(policy.model.config, "max_position_embeddings", None) or float("inf")
    length = [len(a) + len(b) for a, b in zip(encoded.prompt_ids, encoded.completion_ids)]
    whole = [any(mask) and bool(prompt) for mask, prompt in zip(encoded.mask, encoded.prompt_ids)]
    keep = [i for i, size in enumerate(length) if whole[i] and size <= context]
    notes = list(encoded.notes)
    for num, why in (
        (whole.count(False), "have no prompt, or no token of the policy's"),
        (sum(size > context for size in length), f"are longer than the model's context of {context} tokens"),
    ):
        if num:
            notes.append(f"{num} of {len(encoded)} rollouts {why}: they are left out of what needs the checkpoint")
    return replace(encoded.rows(keep), notes=tuple(notes))


def _words(each: LoggedRollout) -> list[str]:
    """A completion without its tokenizer: as many pieces as the log has tokens, else words."""
    if each.completion_ids is not None:
        texts = each.others.get("tokens")
        fits = isinstance(texts, list) and len(texts) == len(each.completion_ids)
        return list(map(str, texts)) if fits else [f"⟨{number}⟩" for number in each.completion_ids]
    return WORDS.findall(prompt_text(each.completion)) or [""]


def _counted(logged: Sequence[LoggedRollout], words: Sequence[list[str]]) -> Encoded:
    names: dict[int, int] = {}
    ids = tuple(list(each.completion_ids or [0] * len(own)) for each, own in zip(logged, words))
    return Encoded(
        tuple(logged),
        tuple(list(each.prompt_ids or []) for each in logged),
        ids,
        tuple(list(each.mask or [True] * len(own)) for each, own in zip(logged, ids)),
        tuple(names.setdefault(group_number(each), len(names)) for each in logged),
        tuple(True for _ in logged),
    )


def token_rows(
    step: LoggedStep, columns: Mapping[str, Tensor], num: int, first: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """At most `num` rollouts as `Run.write_tokens` takes them: those that come `first`, then groups with both
    outcomes.
    """
    rollouts, encoded = step.rollouts, step.encoded
    wins = pool(rollouts.success.double(), rollouts.group_index)
    size = pool(torch.ones_like(wins), rollouts.group_index)
    even = (wins / size - 0.5).abs()
    early = set(first)
    order = sorted(range(len(step)), key=lambda i: (i not in early, float(even[i]), int(rollouts.group_index[i])))[:num]
    rows = []
    for i in order:
        each, length = encoded.logged[i], len(encoded.completion_ids[i])
        rows.append(
            {
                "group": int(rollouts.group_index[i]),
                "prompt": step.prompts[i],
                "completion": prompt_text(each.completion) or "".join(step.pieces[i]),
                "reward": float(rollouts.reward[i]),
                "success": bool(rollouts.success[i]),
                "reason": each.place,
                "token_ids": list(encoded.completion_ids[i]),
                "tokens": step.pieces[i],
                **{name: x[i, :length].tolist() for name, x in columns.items()},
            }
        )
    return rows
