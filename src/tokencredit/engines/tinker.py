"""tinker: the credit of a `Method` as the advantages of its Datums, for methods that need no more than log-probs.

    rows = datums(METHODS["rloo"], prompts, completions, logprobs, rewards, group)
    data = [types.Datum(model_input=types.ModelInput.from_ints(row.input), loss_fn_inputs=row.inputs()) for row in rows]
    loss, settings = loss_of(METHODS["rloo"])
    client.forward_backward(data, loss_fn=loss, loss_fn_config=settings)

tinker adds up the losses of tokens, so an advantage is the credit times the token's weight ω, and the sum is the
method's loss over the batch. Its sampler gives log-probs and no entropies. Written from tinker's documentation and
tested on its data layout; not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.method import Method
from tokencredit.objective import CISPO, Clip
from tokencredit.rollouts import Rollouts

GIVEN = frozenset({"logprob"})


@dataclass(frozen=True)
class DatumRow:
    """input  the tokens of prompt and completion but the last; position k predicts token k + 1

    target_tokens, logprobs, advantages  of the tokens that are predicted; 0 on the prompt's
    """

    input: list[int]
    target_tokens: Tensor
    logprobs: Tensor
    advantages: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What a Datum's `loss_fn_inputs` takes."""
        return {"target_tokens": self.target_tokens, "logprobs": self.logprobs, "advantages": self.advantages}


def datums(
    method: Method,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    reward: Sequence[float],
    group: Sequence[int],
) -> list[DatumRow]:
    """A batch of sampled completions, with the sampler's log-probs, as rows of one optimizer step.

    ValueError names a score that tinker does not have, and a prompt that has no token to predict from.
    """
    missing = sorted(method.needs - GIVEN)
    if missing:
        raise ValueError(f'method "{method.name}" needs {", ".join(missing)}, and tinker samples log-probs alone')
    for k, (prompt, completion, given) in enumerate(zip(prompts, completions, logprobs)):
        if not prompt or len(completion) != len(given):
            raise ValueError(
                f"row {k} has {len(prompt)} prompt tokens, {len(completion)} completion tokens and {len(given)}"
                " log-probs: it needs a prompt, and a log-prob for every token of the completion"
            )
    length = torch.tensor([len(completion) for completion in completions])
    mask = torch.arange(int(length.max())) < length[:, None]
    old = torch.zeros(mask.shape)
    for k, row in enumerate(logprobs):
        old[k, : len(row)] = torch.tensor(row)
    rollouts = Rollouts(torch.tensor(reward), torch.tensor(group), mask, {"logprob": old})
    credit = method.credit(rollouts)
    plan = method.plan(logprob=old, old_logprob=old, credit=credit, rollouts=rollouts)
    advantage = credit * plan.weight
    rows = []
    for k, (prompt, completion) in enumerate(zip(prompts, completions)):
        tokens, before = [*prompt, *completion], torch.zeros(len(prompt) - 1)
        own = slice(0, len(completion))
        aligned = [torch.cat([before, x[k, own]]) for x in (old, advantage)]
        rows.append(DatumRow(tokens[:-1], torch.tensor(tokens[1:]), *aligned))
    return rows


def loss_of(method: Method) -> tuple[str, dict[str, float]]:
    """(tinker's loss_fn, its loss_fn_config) for a method's surrogate. ValueError for one that it does not have."""
    surrogate = method.surrogate
    if type(surrogate) is Clip and surrogate.dual is None:
        return "ppo", {"clip_low_threshold": 1 - surrogate.low, "clip_high_threshold": 1 + surrogate.high}
    if type(surrogate) is CISPO:
        return "cispo", {"clip_low_threshold": surrogate.floor, "clip_high_threshold": surrogate.cap}
    raise ValueError(
        f"{type(surrogate).__name__} is none of tinker's losses that are known here, ppo (Clip) and cispo (CISPO): use"
        " forward_backward_custom with Method.loss"
    )
