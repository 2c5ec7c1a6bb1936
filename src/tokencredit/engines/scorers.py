"""Scores at rollout time, as `CreditTrainer` takes them: {name: function(trainer, inputs, batch) -> [B, T]}.

What a score is and how it is measured stands in `tokencredit.scores`; here it meets the trainer's batch. A scorer whose
attribute `whole` is true reads the model's parameters in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencredit.engines.trainer import Trainer, memory_beside
from tokencredit.engines.trl_groups import gather_rows
from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.scores.draws import uniform_draws
from tokencredit.scores.table import SCORES, available, names_of
from tokencredit.tasks.task import Row, Task

Scorer = Callable[[Any, list[dict], dict[str, Tensor]], Tensor]
SECONDS = "seconds_importance"
FREE_PROXIES = ("varentropy", "margin", "sum_p2")
"""Scores of a forward pass that training measures like the proxies: on its own, when a method needs them."""


def importance_scorers(
    *,
    num_directions: int = 8,
    method: str = "sketch",
    parameters: str = "trainable",
    max_tokens: int = 8192,
    perturbation: str = "first_order",
    scale: float | None = None,
) -> dict[str, Scorer]:
    """{kind: scorer} for every importance proxy; computed only for methods that need them.

    parameters     whose gradients count, as `lm.proxies.importance` takes them: those that are trained, unless told
    perturbation   how `perturbation_variance` is found: to first order, or over `num_directions` models that are moved
                   by "gaussian" noise of deviation `scale` (1e-3) or by "dropout" at the rate `scale` (0.1)

    Directions are drawn anew for every rollout batch, from the trainer's seed and its step. The seconds of a batch are
    logged as `seconds_importance`; they are part of `seconds_scoring`.
    """
    from tokencredit.lm.proxies import check_perturbation

    check_perturbation(perturbation, scale)
    options = {
        "num_directions": num_directions,
        "method": method,
        "parameters": parameters,
        "max_tokens": max_tokens,
        "perturbation": perturbation,
        "scale": scale,
    }
    return {kind: _Proxy(kind, options) for kind in (*names_of("importance"), *FREE_PROXIES)}


def uniform(trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
    """[B, T] uniform in [0, 1): what a method draws with. A function of the trainer's seed, its step and the row among
    all processes.
    """
    size, width = batch["completion_ids"].shape
    row = size * trainer.accelerator.process_index + torch.arange(size)
    drawn = uniform_draws(trainer.args.seed, trainer.state.global_step, row, width)
    return drawn.to(batch["completion_ids"].device)


def js_divergence(trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
    """[B, T]: how far the group's distributions are apart at the position (`scores.siblings`); one forward pass per
    rollout batch. ValueError where a process has parts of groups.
    """
    from tokencredit.lm.packing import grid
    from tokencredit.scores import siblings

    ids = batch["completion_ids"]
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    if len(ids) % size:
        raise ValueError(
            f"js_divergence compares whole groups, and a process has {len(ids)} rollouts in groups of {size}: make"
            f" per_device_train_batch_size x steps_per_generation a multiple of {size}"
        )
    prompts, completions = (own_ids(batch, part) for part in ("prompt", "completion"))
    model, group = trainer.accelerator.unwrap_model(trainer.model), [row // size for row in range(len(ids))]
    options = {"temperature": trainer.temperature, "memory": memory_beside(trainer, model)}
    found = siblings.js_divergence(model, prompts, completions, group, **options)
    return grid(found, ids.shape[1], torch.float32).to(ids.device)


def planning(phrases: Sequence[str] | None = None) -> Scorer:
    """The scorer that marks tokens of phrases that plan: those of `scores.planning`, or your own.

    CreditTrainer(method="hicra", scorers={"planning": planning(["wait", "let me check"])}, ...)
    """

    def scorer(trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        from tokencredit.lm.packing import grid
        from tokencredit.scores.planning import PHRASES
        from tokencredit.scores.planning import planning as mark

        ids, tokenizer = batch["completion_ids"], trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor of images holds one
        found = mark(tokenizer, own_ids(batch, "completion"), PHRASES if phrases is None else phrases)
        return grid(found, ids.shape[1], torch.float32).to(ids.device)

    return scorer


def task_scorers(task: Task, tokenizer: Tokenizer, max_new_tokens: int, batch: int = 512) -> dict[str, Scorer]:
    """Scores that need the task: `step_gain`, and what it knows of its completions. `inputs` are the task's rows.

    batch   completions sampled at once
    """
    return {
        name: _OfTask(name, task, tokenizer, max_new_tokens, batch)
        for name in names_of("task", "steps")
        if name in available(task)
    }


def on_rows(scorer: Scorer, rows: Sequence[Row]) -> Scorer:
    """The scorer, given the task's rows in place of the dataset's, whose column "row" numbers them."""
    return _OnRows(scorer, rows)


def learned_size(folder: str | Path) -> Scorer:
    """The scorer of a credit model that `tokencredit credit-model fit` wrote: the size of Q − V that it expects of
    every token, on the hidden states of the policy that is trained. One forward pass per rollout batch.

        CreditTrainer(method=METHODS["token_sampling"].replace(score="learned_size"),
                      scorers={"learned_size": learned_size("runs/credit_model")}, ...)
    """
    from tokencredit.credit_model.model import CreditModel

    fitted = CreditModel.load(Path(folder))

    def scorer(trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        from tokencredit.lm.packing import grid

        prompts, completions = (own_ids(batch, part) for part in ("prompt", "completion"))
        model, ids = trainer.accelerator.unwrap_model(trainer.model), batch["completion_ids"]
        size = trainer.args.per_device_train_batch_size
        options = {"temperature": trainer.temperature, "batch": size}
        found = fitted.predict(model, prompts, completions, [0.0] * len(prompts), **options)
        return grid(found["learned_size"], ids.shape[1], torch.float32).to(ids.device)

    return _Told(scorer, whole=True)


def log_ratio(policy: Any, reference: Any) -> Scorer:
    """The scorer log π_policy(o_t) − log π_reference(o_t), nats at the sampling temperature, of two models; None is the
    policy that is trained.

    As `implicit_reward` of a policy trained on preferences and its reference, as `self_reward` of None and the
    reference. Two forward passes per rollout batch; the models are the caller's to place, and are not trained.

        CreditTrainer(method="rto_group", scorers={"implicit_reward": log_ratio(dpo_policy, reference)}, ...)
    """

    def scorer(trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        own, other = (_logprob(trainer, trained if model is None else model, batch) for model in (policy, reference))
        return own - other

    return _Told(scorer, whole=policy is None or reference is None)


def _logprob(trainer: Trainer, model: CausalModel, batch: dict[str, Tensor]) -> Tensor:
    """[B, T]: log-probs of the completions under a model, 0 off them."""
    from tokencredit.lm.packing import grid
    from tokencredit.lm.scoring import score

    prompts, completions = (own_ids(batch, part) for part in ("prompt", "completion"))
    size, ids = trainer.args.per_device_train_batch_size, batch["completion_ids"]
    options = {"temperature": trainer.temperature, "batch": size, "names": ("logprob",)}
    memory = memory_beside(trainer, trainer.accelerator.unwrap_model(trainer.model))
    found = score(model, prompts, completions, memory=memory, **options)
    return grid(found["logprob"], ids.shape[1], torch.float32).to(ids.device)


@dataclass(frozen=True)
class _Told:
    """A function, and whether it reads the trained model's parameters in full."""

    function: Scorer
    whole: bool

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        return self.function(trainer, inputs, batch)


@dataclass(frozen=True)
class _OnRows:
    scorer: Scorer
    rows: Sequence[Row]

    @property
    def whole(self) -> bool:
        return getattr(self.scorer, "whole", False)

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        return self.scorer(trainer, [self.rows[row["row"]] for row in inputs], batch)


@dataclass(frozen=True)
class _Proxy:
    kind: str
    options: dict[str, Any]
    whole: bool = True

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        from tokencredit.lm.proxies import importance

        began = time.perf_counter()
        size, width = batch["completion_ids"].shape
        first = size * trainer.accelerator.process_index
        own = (
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1),
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = importance(
            model,
            *(gather_rows(trainer, x) for x in own),
            kinds=(self.kind,),
            temperature=trainer.temperature,
            seed=trainer.args.seed + 1_000_003 * trainer.state.global_step,
            memory=memory_beside(trainer, model),
            rows=slice(first, first + size),
            **self.options,
        )[self.kind].value[first : first + size, : own[0].shape[1]][:, -width:]
        if found.is_cuda:
            torch.cuda.synchronize()
        trainer._metrics["train" if trainer.model.training else "eval"][SECONDS].append(time.perf_counter() - began)
        return found.detach()


@dataclass(frozen=True)
class _OfTask:
    name: str
    task: Task
    tokenizer: Tokenizer
    max_new_tokens: int
    batch: int

    @property
    def whole(self) -> bool:
        return self.name != "oracle_positions"  # which no model is asked for

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        from tokencredit.lm.distribution import seed_of
        from tokencredit.lm.packing import grid
        from tokencredit.lm.policy import Policy
        from tokencredit.lm.readout import evaluating
        from tokencredit.scores.measure import measure

        if SCORES[self.name].source == "steps" and (trainer.min_p or trainer.repetition_penalty != 1.0):
            raise ValueError(
                f"{self.name} samples with temperature, top_k and top_p alone: leave min_p and repetition_penalty unset"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        policy = Policy(
            model,
            self.tokenizer,
            self.task,
            trainer.temperature,
            self.max_new_tokens,
            top_k=trainer.top_k or 0,
            top_p=trainer.top_p or 1.0,
            memory=memory_beside(trainer, model),
        )
        prompts, completions = (own_ids(batch, part) for part in ("prompt", "completion"))
        seed = seed_of(trainer.args.seed, trainer.state.global_step)
        with evaluating(model):
            found = measure(policy, inputs, prompts, completions, [self.name], seed=seed, batch=self.batch)[self.name]
        ids = batch["completion_ids"]
        return grid(found, ids.shape[1], torch.float32).to(ids.device)


def own_ids(batch: dict[str, Tensor], part: str) -> list[list[int]]:
    """Token ids without padding."""
    return [ids[mask].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool())]
