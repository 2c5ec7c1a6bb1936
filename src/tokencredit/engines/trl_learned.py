"""Credit from a model that is fitted while training: every so many optimizer steps a few prompts are answered by the
policy as it is, the effects of their tokens measured by re-sampling, and a credit model fitted to them.

What the labels sampled counts as sampled, beside the rollouts that are trained on: `sampled_rollouts` and
`sampled_tokens` hold both, so a budget of either ends the run by both. Before the model is fitted anew the one before
is held against the new effects, which it has not seen: `learned/captured` is the share of their squares in the fifth of
the tokens that it puts first, of a policy that has moved on since.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencredit.credit_model.evaluate import LEARNED, evaluate
from tokencredit.credit_model.features import TokenFeatures, features
from tokencredit.credit_model.labels import Labels, measured_tokens
from tokencredit.credit_model.model import CreditModel
from tokencredit.engines.scorers import own_ids
from tokencredit.engines.trainer import Trainer, memory_beside
from tokencredit.engines.trl_rewards import succeeded
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.models import Tokenizer
from tokencredit.lm.packing import grid
from tokencredit.lm.policy import Policy
from tokencredit.lm.readout import evaluating
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.budgets import Fixed
from tokencredit.pivotality.measure import measure
from tokencredit.pivotality.store import RolloutStore
from tokencredit.tasks.task import Row, Task

LEAST = 10
"""Prompts that a credit model needs, to fit, stop and calibrate on different ones."""


@dataclass
class LearnedCredit:
    """The scorer `learned_credit` [B, T]: the Q − V that the model expects of every token, given the rollout's outcome.

    rows       of the task, whose prompts are answered for the labels
    every      optimizer steps between fits; the first is at the first rollout batch, and a run that is resumed begins
               with one
    prompts, samples, rollouts   of every fit: prompts, completions of each, and rollouts of alternatives per token
    """

    task: Task
    tokenizer: Tokenizer
    rows: Sequence[Row]
    max_new_tokens: int
    every: int = 20
    prompts: int = 24
    samples: int = 1
    rollouts: int = 4
    model: CreditModel | None = field(default=None, init=False)
    due: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("prompts", LEAST), ("samples", 1), ("rollouts", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"credit_model.{name} must be at least {least}, got {getattr(self, name)}")

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        step = trainer.state.global_step
        if self.model is None or step >= self.due:
            self._fit(trainer, step)
            self.due = step + self.every
        prompts, completions = (own_ids(batch, part) for part in ("prompt", "completion"))
        outcome = succeeded(trainer).float().tolist()
        options = {"temperature": trainer.temperature, "batch": trainer.args.per_device_train_batch_size}
        model, ids = trainer.accelerator.unwrap_model(trainer.model), batch["completion_ids"]
        found = self.model.predict(model, prompts, completions, outcome, **options)
        return grid(found["learned_credit"], ids.shape[1], torch.float32).to(ids.device)

    def _fit(self, trainer: Trainer, step: int) -> None:
        if trainer.accelerator.num_processes > 1:
            raise ValueError("learned_credit measures and fits in one process: train without a launcher")
        seed = seed_of("learned credit", trainer.args.seed, step)
        with evaluating(trainer.accelerator.unwrap_model(trainer.model)), torch.random.fork_rng():
            sampled = self._learn(trainer, seed)
        for unit, number in sampled.items():
            trainer._metrics["train"][f"learned/{unit}"].append(float(number))
            trainer.sampled_besides[unit] += number

    def _learn(self, trainer: Trainer, seed: int) -> dict[str, int]:
        """The next model in place of this one; what its labels sampled."""
        found, labels, sampled = self._labels(trainer, seed)
        if self.model is not None:
            captured = evaluate(self.model, found, labels, bootstraps=2, seed=seed).captured[LEARNED]
            trainer._metrics["train"]["learned/captured"].append(captured.value)
        self.model = CreditModel.fit(found, labels, seed=seed % 2**31)
        return sampled

    def _labels(self, trainer: Trainer, seed: int) -> tuple[TokenFeatures, Labels, dict[str, int]]:
        """Features and measured effects of the tokens of fresh completions, and what was sampled for them."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        memory = memory_beside(trainer, model)
        policy = Policy(model, self.tokenizer, self.task, trainer.temperature, self.max_new_tokens, memory=memory)
        different = list({str(row["prompt"]): row for row in self.rows}.values())
        if len(different) < self.prompts:
            raise ValueError(f"credit_model.prompts asks for {self.prompts} prompts, there are {len(different)}")
        rows = random.Random(seed).sample(different, self.prompts)
        asked = policy.encode_rows(rows)
        drawn = policy.complete(asked, self.samples, seed=seed)
        each = [(i, c.ids) for i, some in enumerate(drawn) for c in some]
        measured = measure(
            [Trace(tuple(asked[i]), tuple(ids)) for i, ids in each],
            policy.sampler(),
            lambda k, ids, truncated: policy.verdict(ids, rows[each[k][0]], truncated),
            budget=Fixed(self.rollouts),
            max_new_tokens=self.max_new_tokens,
            store=RolloutStore(None, {}),
            seed=seed,
        )
        prompts, completions = [list(m.trace.prompt) for m in measured], [list(m.trace.completion) for m in measured]
        found = features(model, prompts, completions, [m.reward for m in measured], temperature=trainer.temperature)
        effect, error = (
            torch.cat([torch.from_numpy(getattr(m.estimate.before_after, name)) for m in measured])
            for name in ("value", "standard_error")
        )
        prompt = torch.tensor([i for i, ids in each]).repeat_interleave(torch.tensor([len(ids) for _, ids in each]))
        written = sum(map(len, completions))
        sampled = {
            "rollouts": len(measured) + sum(m.rollouts for m in measured),
            "tokens": written + sum(m.generated for m in measured),
        }
        names = tuple(f"{seed} {i}" for i in range(len(rows)))
        some, labels = measured_tokens(found, Labels(effect, error, prompt, names, sampled["tokens"]))
        return some, labels, sampled


def learned_credit(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], limit: int, options: dict[str, Any]) -> Any:
    """The scorer with the options of `TrainConfig.credit_model`. ValueError for one that there is not."""
    known = ("every", "prompts", "samples", "rollouts")
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"credit_model has no {', '.join(unknown)}; it has: {', '.join(known)}")
    return LearnedCredit(task, tokenizer, rows, limit, **options)
