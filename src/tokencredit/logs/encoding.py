"""Logged rollouts -> token ids, masks, groups and `Rollouts`: ids where they were logged, else the checkpoint's
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.models import Tokenizer
from tokencredit.logs.conversation import REWRITTEN, Turns, encode_turns, lost, prompt_ids, turn_end, turn_ends
from tokencredit.logs.rollout import LoggedRollout
from tokencredit.masked import zero_off
from tokencredit.rollouts import TOKEN_REWARD, Rollouts

MOST_LOST = 0.5
"""The share of texts that may not survive the tokenizer before it is refused as another's."""


@dataclass(frozen=True)
class Encoded:
    """N logged rollouts with their token ids.

    logged          [N] the rollouts as they were logged
    prompt_ids      [N] lists of token ids, and `completion_ids`
    mask            [N] lists of bool: which tokens of the completion the policy wrote
    group           [N] int: equal for completions of one prompt in one step
    faithful        [N] whether the text survives the tokenizer, so that the ids can be those that were sampled
    notes           what has to be known of it, in words
    """

    logged: tuple[LoggedRollout, ...]
    prompt_ids: tuple[list[int], ...]
    completion_ids: tuple[list[int], ...]
    mask: tuple[list[bool], ...]
    group: tuple[int, ...]
    faithful: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.logged)

    @property
    def steps(self) -> list[int | None]:
        """The steps there are, ascending; None first, for rollouts without one."""
        return sorted({each.step for each in self.logged}, key=lambda step: (step is not None, step))

    def at(self, step: int | None) -> Encoded:
        """The rollouts of one step."""
        return self.rows([i for i, each in enumerate(self.logged) if each.step == step])

    def rows(self, keep: Sequence[int]) -> Encoded:
        """These rollouts, in this order."""
        names = ("logged", "prompt_ids", "completion_ids", "mask", "group", "faithful")
        return replace(self, **{name: tuple(getattr(self, name)[i] for i in keep) for name in names})

    def rewarded(self) -> Encoded:
        """Those that have a reward."""
        return self.rows([i for i, each in enumerate(self.logged) if each.reward is not None])

    def rollouts(self, scores: Mapping[str, Sequence[Any]] | None = None, success_above: float = 0.0) -> Rollouts:
        """All of them as `Rollouts` [N, T].

        scores   {name: [N] numbers per token}, besides those that every rollout was logged with

        ValueError names a rollout without a reward.
        """
        for each in self.logged:
            if each.reward is None:
                raise ValueError(f"{each.place} has no reward; leave such rollouts out with rewarded()")
        mask = self.padded(self.mask, False)
        found = {name: self.tokens(name) for name in self.logged_tokens}
        found |= {name: self.padded(values) for name, values in (scores or {}).items()}
        # A number that was not logged is no number: such a score is not one of these rollouts'.
        whole = {n: x for n, x in found.items() if n == TOKEN_REWARD or bool(torch.isfinite(x[mask]).all())}
        return Rollouts(
            reward=torch.tensor([each.reward for each in self.logged], dtype=torch.float64),
            group=torch.tensor(self.group, dtype=torch.long),
            mask=mask,
            scores=whole,
            success_above=success_above,
        )

    @property
    def logged_tokens(self) -> list[str]:
        """Names of the numbers per token that every rollout was logged with; a reward of tokens, that any was."""
        sets = [set(each.tokens) for each in self.logged]
        common = set.intersection(*sets) if sets else set()
        return sorted(common | ({TOKEN_REWARD} & set().union(*sets)))

    def tokens(self, name: str) -> Tensor:
        """[N, T]: numbers that were logged per token, NaN where there is none; 0 in the padding."""
        return self.padded([each.tokens.get(name, [None] * len(m)) for each, m in zip(self.logged, self.mask)])

    def credit(self) -> Tensor | None:
        """[N, T]: the advantages as they were logged, for each token or for all of a rollout; 0 off the mask, NaN where
        a rollout has none. None where no rollout has.
        """
        rows = [
            each.tokens.get("advantage", [each.advantage] * len(mask)) for each, mask in zip(self.logged, self.mask)
        ]
        if all(x is None for row in rows for x in row):
            return None
        return zero_off(self.padded(rows), self.padded(self.mask, False))

    def padded(self, values: Sequence[Sequence[Any]], empty: float | bool = 0.0) -> Tensor:
        """[N, T]: lists per token, padded on the right; None as NaN."""
        width = max(map(len, self.completion_ids), default=0)
        kind = torch.bool if empty is False else torch.float32
        out = torch.full((len(self), width), empty, dtype=kind)
        for row, own in zip(out, values):
            own = own.tolist() if isinstance(own, Tensor) else own
            row[: len(own)] = torch.tensor([float("nan") if x is None else x for x in own], dtype=kind)
        return out


def encode(
    rollouts: Iterable[LoggedRollout],
    tokenizer: Tokenizer,
    *,
    chat: bool | None = None,
    limit: int | None = None,
    ends: Sequence[int] | None = None,
) -> Encoded:
    """Token ids, masks and groups of logged rollouts.

    chat    as `lm.prompts.encode_prompt` takes it, for prompts that were logged as text
    limit   tokens that a completion could have: a shorter one has ended
    ends    token ids that end a completion of the model's, where they are known (`Policy.ends`)

    Ids are used where they were logged. Text is tokenised; a text that does not decode to itself is counted and named
    in the notes. Text is logged without the token that ends it: it is put back where the log says that the completion
    was not cut off, or where it is shorter than `limit`. In a chat it is the one that the template writes behind what
    an assistant says, and stays out where that is not known to end a completion. Of messages, assistants' turns are the
    policy's and all else is masked. ValueError where the log is of another tokenizer: ids outside of its vocabulary, or
    most texts lost.
    """
    logged = tuple(rollouts)
    notes: list[str] = []
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    prompts, chats = zip(*_prompts(logged, tokenizer, chat)) if logged else ((), ())
    end = {False: tokenizer.eos_token_id, True: turn_end(tokenizer, ends) if any(chats) else None}
    found = [_completion(each, tokenizer, limit, end[is_chat]) for each, is_chat in zip(logged, chats)]
    logged = tuple(_with_turns(each, turns) for each, turns in zip(logged, found))
    for each, prompt, turns in zip(logged, prompts, found):
        _check_ids(each, prompt, size)
        _check_ids(each, turns.completion, size)
    _check_faithful(logged, found, notes)
    _say_ends(found, notes)
    return Encoded(
        logged,
        prompts,
        tuple(each.completion for each in found),
        tuple(each.mask for each in found),
        _groups(logged, prompts),
        tuple(not each.why for each in found),
        tuple(notes),
    )


def _prompts(logged: Sequence[LoggedRollout], tokenizer: Tokenizer, chat: bool | None) -> list[tuple[list[int], bool]]:
    """Token ids of the prompts, and whether each is one of a chat; equal ones are encoded once."""
    known: dict[Any, tuple[list[int], bool]] = {}
    template, found = bool(getattr(tokenizer, "chat_template", None)), []
    for each in logged:
        # Messages answer a message, where there is a template for them.
        answered = template and not isinstance(each.completion, str)
        if each.prompt_ids is not None:
            asked = template and (bool(chat) or not isinstance(each.prompt, str))
            found.append((list(each.prompt_ids), answered or asked))
            continue
        key = prompt_key(each, ()), answered
        if key not in known:
            known[key] = prompt_ids(tokenizer, each.prompt, answered or chat) if each.prompt else ([], answered)
        found.append(known[key])
    return found


def _completion(each: LoggedRollout, tokenizer: Tokenizer, limit: int | None, end: int | None) -> Turns:
    if each.completion_ids is None:
        found = encode_turns(each, tokenizer, limit, end)
    else:
        found = Turns(list(each.completion_ids), [True] * len(each.completion_ids))
        if each.completion and isinstance(each.completion, str):
            found = replace(found, why=_unlike(each.completion, found.completion, tokenizer))
    if each.mask is not None:
        _check_length("mask", each.mask, found, each)
        found = replace(found, mask=list(each.mask))
    for name, values in each.tokens.items():
        _check_length(name, values, found, each)
    return found


def _unlike(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """How logged ids differ from the text beside them, which may be their last turn alone; "" where they do not."""
    for skip in (True, False):
        back = tokenizer.decode(ids, skip_special_tokens=skip)
        if text.strip() in back:
            return ""
    return lost(text, back)


def _with_turns(each: LoggedRollout, turns: Turns) -> LoggedRollout:
    """The rollout with its rewards of turns at the last token of each; ValueError where a reward stands at a token that
    the policy did not write, or where there are more or fewer than turns.
    """
    if each.turn_reward is not None and "token_reward" not in each.tokens:
        ends = turn_ends(turns.mask)
        if len(each.turn_reward) != len(ends):
            raise ValueError(
                f"{each.place}: {len(each.turn_reward)} rewards of turns, and the policy has {len(ends)} turns"
            )
        rewards = dict(zip(ends, each.turn_reward))
        tokens = {**each.tokens, "token_reward": [rewards.get(t) for t in range(len(turns.mask))]}
        return replace(each, tokens=tokens)
    for t, (reward, own) in enumerate(zip(each.tokens.get("token_reward", ()), turns.mask)):
        if reward is not None and reward != 0 and not own:
            raise ValueError(
                f"{each.place}: a reward stands at token {t}, which the policy did not write: put it at the last token"
                " of the turn that earned it"
            )
    return each


def _check_ids(each: LoggedRollout, ids: Sequence[int], size: int) -> None:
    if ids and max(ids) >= size:
        raise ValueError(
            f"{each.place}: there is the token id {max(ids)}, and the tokenizer has {size} tokens: it is not the one"
            " that wrote this log. Name the checkpoint that was trained"
        )


def _check_length(name: str, values: Sequence[Any], found: Turns, each: LoggedRollout) -> None:
    if len(values) != len(found.completion):
        raise ValueError(
            f"{each.place}: {name!r} has {len(values)} values, and the completion {len(found.completion)} tokens"
            + ("" if each.completion_ids is not None else " under this tokenizer, which need not be the log's")
        )


def _say_ends(found: Sequence[Turns], notes: list[str]) -> None:
    if unknown := sum(each.end_unknown for each in found):
        notes.append(
            f"{unknown} of {len(found)} completions are text of which the log does not say whether they were cut off,"
            " or the chat template not how a turn ends: they are taken without the token that ends them. Say how long"
            " one could be (limit=, --max-new-tokens)"
        )


def _check_faithful(logged: Sequence[LoggedRollout], found: Sequence[Turns], notes: list[str]) -> None:
    rewritten = [i for i, each in enumerate(found) if each.why == REWRITTEN]
    if rewritten:
        which = f"{len(rewritten)} of {len(logged)} conversations end where the chat template rewrites earlier turns"
        notes.append(f"{which}, so that nobody knows what the policy was shown: {_places(logged, rewritten)}")
    gone = [i for i, each in enumerate(found) if each.why and each.why != REWRITTEN]
    if not gone:
        return
    which = f"{len(gone)} of {len(logged)} texts do not survive the tokenizer"
    if len(gone) > MOST_LOST * len(logged):
        raise ValueError(
            f"{which} ({_places(logged, gone)}; {found[gone[0]].why}): it is not the one that wrote this log. Name the"
            " checkpoint that was trained"
        )
    notes.append(f"{which}: {_places(logged, gone)}")


def _places(logged: Sequence[LoggedRollout], rows: Sequence[int]) -> str:
    return ", ".join(logged[i].place for i in rows[:5]) + (", …" if len(rows) > 5 else "")


def _groups(logged: Sequence[LoggedRollout], prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Numbers of groups: those of the log, else equal prompts of a step."""
    numbers: dict[Any, int] = {}
    found = []
    for each, ids in zip(logged, prompts):
        own = ("group", each.group) if each.group is not None else ("prompt", prompt_key(each, ids))
        found.append(numbers.setdefault((each.step, own), len(numbers)))
    return tuple(found)


def prompt_key(each: LoggedRollout, ids: Sequence[int]) -> Any:
    """What tells prompts apart: their text or messages, else their ids."""
    if not each.prompt:
        return tuple(ids)
    return each.prompt if isinstance(each.prompt, str) else json.dumps(each.prompt, sort_keys=True)
