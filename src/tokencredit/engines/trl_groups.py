"""Whole groups for the TRL engine: rollouts gathered across processes in group order, and dynamic sampling over
generation rounds.
"""

from __future__ import annotations

import random
from collections.abc import MutableSequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tokencredit.durable import write_parquet
from tokencredit.engines.trainer import Trainer
from tokencredit.engines.trl_rewards import check_scored, total
from tokencredit.rollouts import Rollouts

LEFT = ("prompt_ids", "prompt_mask")
TOKENS = ("prompt_ids", "completion_ids")


@dataclass
class Stash:
    """What passes through TRL's hooks while it generates and scores one batch on this process; rewards are those of all
    processes.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
    token_rewards: list | None = None
    completions: list = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)


@dataclass
class GatheredBatch:
    """One gathered rollout batch, the same on every process: rows in group order, [N] and [N, T].

    length and truncated are those of the sampled text, whatever the mask leaves of it. Token ids, prompts, texts and
    dataset rows are gathered only for a batch that is recorded; `table` holds TRL's table of completions where that is
    logged. `drawn` are the generation rounds that a batch was chosen from, if there were several.
    """

    reward: Tensor
    group: Tensor
    mask: Tensor
    length: Tensor
    truncated: Tensor
    success_above: float
    scores: dict[str, Tensor]
    completion_ids: Tensor | None = None
    prompts: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    table: dict[tuple[str, ...], list] = field(default_factory=dict)
    drawn: tuple[GatheredBatch, ...] = ()

    @cached_property
    def rollouts(self) -> Rollouts:
        return Rollouts(
            reward=self.reward, group=self.group, mask=self.mask, scores=self.scores, success_above=self.success_above
        )

    @classmethod
    def gather(
        cls, trainer: Trainer, inputs: list[dict], out: dict, stash: Stash, group_size: int, with_text: bool
    ) -> GatheredBatch:
        check_scored(stash.rewards, trainer.reward_func_names)
        reward = total(trainer, stash.rewards)
        mask = loss_mask(out)
        ends = {*_eos_token_ids(trainer), trainer._tokenizer.pad_token_id}
        truncated = torch.tensor([not ids or ids[-1] not in ends for ids in stash.completion_ids], device=mask.device)
        length = (
            mask.sum(1)
            if "tool_mask" in out
            else torch.tensor([len(ids) for ids in stash.completion_ids], device=mask.device)
        )
        length, truncated = trainer.accelerator.gather(torch.stack([length, truncated.long()], 1)).unbind(1)
        text = {}
        if with_text or trainer.log_completions:
            text["completion_ids"] = gather_rows(trainer, out["completion_ids"], trainer._tokenizer.pad_token_id)
        if with_text:
            text["prompts"] = _gather_objects([row.get("prompt", "") for row in inputs])
            text["texts"] = _gather_objects(stash.completions)
            text["rows"] = _gather_objects([_plain(row) for row in inputs])
        return cls(
            reward=reward,
            group=torch.arange(len(reward), device=reward.device) // group_size,
            mask=gather_rows(trainer, mask),
            length=length,
            truncated=truncated.bool(),
            success_above=trainer.success_above,
            scores={name: gather_rows(trainer, stash.scores[name]) for name in sorted(stash.scores)},
            table={name: list(column)[-len(reward) :] for name, column in _columns(trainer).items()},
            **text,
        )

    def record(self, trainer: Trainer, credit: Tensor) -> dict:
        """Everything a token view needs, as CPU tensors and lists; prompts and texts as TRL has them, messages
        included.
        """
        return {
            "step": trainer.state.global_step,
            "prompts": self.prompts,
            "texts": self.texts,
            "rows": self.rows,
            "group": self.group.tolist(),
            "reward": self.reward.tolist(),
            "success": self.rollouts.success.tolist(),
            "truncated": self.truncated.tolist(),
            "mask": self.mask.cpu(),
            "completion_ids": self.completion_ids.cpu(),
            "scores": {name: score.float().cpu() for name, score in self.rollouts.scores.items()},
            "credit": credit.cpu(),
        }


def loss_mask(inputs: dict) -> Tensor:
    """[b, T] bool: the tokens that the policy wrote and that count."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def trimmed(inputs: dict, rows: Tensor) -> dict:
    """These rows of a micro-batch, cut to their longest prompt and completion."""
    size, width = inputs["completion_ids"].shape
    kept = {k: v[rows] if torch.is_tensor(v) and v.dim() and len(v) == size else v for k, v in inputs.items()}
    longest = max(int(kept["completion_mask"].sum(1).max()), 1)
    padding = kept["prompt_mask"].shape[1] - max(int(kept["prompt_mask"].sum(1).max()), 1)
    for name, value in kept.items():
        if name in ("prompt_ids", "prompt_mask"):
            kept[name] = value[:, padding:]
        elif torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width:
            kept[name] = value[:, :longest]
    return kept


def gather_rows(trainer: Trainer, x: Tensor, pad=0) -> Tensor:
    """[b, t] of every process -> [N, T], right-padded to the longest, in process order."""
    accelerator = trainer.accelerator
    # Booleans travel as integers: where accelerate pads them, it makes integers of them, on the processes that are
    # padded alone.
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    return accelerator.gather(accelerator.pad_across_processes(sent.contiguous(), dim=1, pad_index=pad)).to(x.dtype)


def rewrite_table(trainer: Trainer, batch: GatheredBatch, credit: Tensor) -> None:
    """TRL's table of completions: the rollouts that are trained on, with a rollout's mean credit where TRL shows its
    advantage.
    """
    advantages = trainer._logs["advantages"]
    for _ in range(min(len(batch.reward), len(advantages))):
        advantages.pop()
    advantages.extend((credit.sum(1) / batch.mask.sum(1).clamp(min=1)).tolist())
    if batch.drawn:
        for name, column in _columns(trainer).items():
            column.clear()
            column.extend(batch.table.get(name, [None] * len(batch.reward)))


def token_columns(batch: GatheredBatch, credit: Tensor) -> dict[str, list]:
    """{column: [N] lists per token} of what a rollout was trained on: ids, which of them the policy wrote, credit and
    scores. None for a rollout that is masked whole.
    """
    ends = [int(own.nonzero()[-1]) + 1 if own.any() else 0 for own in batch.mask]
    tensors = {"completion_ids": batch.completion_ids, "mask": batch.mask, "credit": credit, **batch.rollouts.scores}
    rows = {name: zip(x.cpu(), ends) for name, x in tensors.items()}
    return {name: [x[:end].tolist() if end else None for x, end in row] for name, row in rows.items()}


def extend_table(trainer: Trainer, columns: dict[str, list]) -> None:
    """Puts numbers per token into the table of completions that TRL has just written for this step."""
    import pyarrow
    import pyarrow.parquet

    name = f"completions_{trainer.state.global_step:05d}.parquet"
    path = Path(trainer.args.output_dir) / "completions" / name
    table = pyarrow.parquet.read_table(path) if path.exists() else None
    if table is None or any(len(values) != len(table) for values in columns.values()):
        return
    for name, values in columns.items():
        kind = {"completion_ids": pyarrow.int32(), "mask": pyarrow.bool_()}.get(name, pyarrow.float32())
        if name not in table.column_names:
            table = table.append_column(name, pyarrow.array(values, pyarrow.list_(kind)))
    write_parquet(path, table)


def draw_again(trainer: Trainer, out: dict, batch: GatheredBatch) -> tuple[dict, GatheredBatch]:
    """DAPO's dynamic sampling: further rounds of fresh prompts until every group holds both outcomes, or the rounds are
    used up.

    All decisions are made from gathered rewards and a generator seeded by (seed, step, round), so every process makes
    the same. Groups beyond need are dropped; where too few were found, one-sided groups fill the batch, which the
    trainer gives no credit.
    """
    size, wanted = trainer.num_generations, len(batch.reward)
    outs, rounds = [out], [batch]
    found = int(batch.rollouts.mixed.sum())
    while found < wanted and len(rounds) < trainer.max_rounds:
        inputs = _fresh_inputs(trainer, wanted // size, len(rounds))
        more_out, more = trainer._roll_out(inputs)
        outs.append(more_out)
        rounds.append(more)
        found += int(more.rollouts.mixed.sum())
    drawn = wanted * len(rounds)
    figures = {
        "rounds": len(rounds),
        "drawn_groups": drawn / size,
        "mixed_groups": found / size,
        "dropped_groups": (drawn - wanted) / size,
        "filled_groups": max(wanted - found, 0) / size,
    }
    for name, value in figures.items():
        trainer._metrics["train"][f"dynamic_sampling/{name}"].append(float(value))
    if len(rounds) == 1:
        return out, batch
    mixed = torch.cat([b.rollouts.mixed for b in rounds])
    chosen = torch.cat([mixed.nonzero()[:, 0], (~mixed).nonzero()[:, 0]])[:wanted]
    return _choose_out(trainer, outs, chosen), _choose_batch(trainer, rounds, chosen)


def _fresh_inputs(trainer: Trainer, num_prompts: int, turn: int) -> list[dict]:
    """This process's rows of a fresh draw of prompts, each repeated for its group."""
    draw = random.Random(f"{trainer.args.seed} {trainer.state.global_step} {turn}")
    prompts = range(len(trainer.train_dataset))
    picks = draw.sample(prompts, num_prompts) if num_prompts <= len(prompts) else draw.choices(prompts, k=num_prompts)
    rows = [i for i in picks for _ in range(trainer.num_generations)]
    mine = rows[share(trainer, len(rows))]
    read = {i: trainer.train_dataset[i] for i in dict.fromkeys(mine)}
    return [dict(read[i]) for i in mine]


def share(trainer: Trainer, rows: int) -> slice:
    """This process's part of gathered rows."""
    each = rows // trainer.accelerator.num_processes
    return slice(trainer.accelerator.process_index * each, (trainer.accelerator.process_index + 1) * each)


def _choose_out(trainer: Trainer, outs: list[dict], chosen: Tensor) -> dict:
    """TRL's tensors of the chosen rows, this process's share. Images, which have no row of their own, are refused."""
    if any(out.get(k) is not None for out in outs for k in ("pixel_values", "image_grid_thw", "num_images")):
        raise ValueError("dynamic sampling does not reorder images: use max_rounds=1, or a method without it")
    pad = trainer._tokenizer.pad_token_id
    mine = {}
    for name, value in sorted(outs[0].items()):
        if torch.is_tensor(value) and value.dim() == 2:
            parts = [out[name].flip(1) if name in LEFT else out[name] for out in outs]
            value = _stack(
                [gather_rows(trainer, part, pad if name in TOKENS else 0) for part in parts],
                pad if name in TOKENS else 0,
            )
            value = value[chosen][share(trainer, len(chosen))]
            mine[name] = value.flip(1) if name in LEFT else value
    mine["num_items_in_batch"] = trainer.accelerator.gather(loss_mask(mine).sum()).sum()
    return mine


def _choose_batch(trainer: Trainer, rounds: list[GatheredBatch], chosen: Tensor) -> GatheredBatch:
    picks = chosen.tolist()
    ids = [b.completion_ids for b in rounds if b.completion_ids is not None]
    return replace(
        rounds[0],
        reward=torch.cat([b.reward for b in rounds])[chosen],
        mask=_stack([b.mask for b in rounds])[chosen],
        length=torch.cat([b.length for b in rounds])[chosen],
        truncated=torch.cat([b.truncated for b in rounds])[chosen],
        scores={name: _stack([b.scores[name] for b in rounds])[chosen] for name in rounds[0].scores},
        completion_ids=_stack(ids, trainer._tokenizer.pad_token_id)[chosen] if ids else None,
        **{name: _pick([getattr(b, name) for b in rounds], picks) for name in ("prompts", "texts", "rows")},
        table={
            name: _pick([b.table.get(name, [None] * len(b.reward)) for b in rounds], picks) for name in rounds[-1].table
        },
        drawn=tuple(rounds),
    )


def _stack(parts: list[Tensor], pad=0) -> Tensor:
    """Rows of several rounds under one width, padded on the right."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=pad) for p in parts])


def _pick(lists: list[list], picks: list[int]) -> list:
    together = [item for part in lists for item in part]
    return [together[i] for i in picks] if together else []


def _columns(trainer: Trainer) -> dict[tuple[str, ...], MutableSequence]:
    """The columns of TRL's table of completions, but for the advantages; none where it is not logged."""
    if not trainer.log_completions:
        return {}
    logs = trainer._logs
    plain = {(name,): logs[name] for name in ("prompt", "completion")}
    return plain | {(name, inner): column for name in ("rewards", "extra") for inner, column in logs[name].items()}


def _eos_token_ids(trainer: Trainer) -> list[int]:
    found = getattr(trainer, "eos_token_ids", None)
    return found if found is not None else [trainer._tokenizer.eos_token_id]


def _gather_objects(values: list) -> list:
    from accelerate.utils import gather_object

    return gather_object(values)


def _plain(row: dict) -> dict:
    return {k: v for k, v in row.items() if isinstance(v, str | int | float | bool | list | dict | None)}
