"""Whole groups for the TRL engine: rollouts gathered across processes in group order, and dynamic sampling over generation rounds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokencredit.rollouts import Rollouts

LEFT = ("prompt_ids", "prompt_mask")


@dataclass
class Batch:
    """One gathered rollout batch, the same on every process: rows in group order, [N] and [N, T].

    Prompts, texts and dataset rows are gathered only where somebody reads them.
    """

    reward: Tensor
    per_function: Tensor
    group: Tensor
    mask: Tensor
    completion_ids: Tensor
    truncated: Tensor
    scores: dict[str, Tensor]
    prompts: list
    texts: list
    rows: list[dict]
    rounds: int = 1
    _rollouts: Rollouts | None = field(default=None, repr=False)

    @classmethod
    def gather(cls, trainer, inputs: list[dict], out: dict, stash: dict, group_size: int) -> Batch:
        mask = out["completion_mask"] if "tool_mask" not in out else out["completion_mask"] * out["tool_mask"]
        weights = trainer.reward_weights.to(stash["rewards_per_func"].device)
        per_function = stash["rewards_per_func"]
        unscored = torch.isnan(per_function).all(1)
        if unscored.any():
            row = int(unscored.nonzero()[0, 0])
            raise ValueError(f"every reward function returned None for rollout {row}: give each rollout a number (0.0 for no answer)")
        reward = (per_function * weights).nansum(1)
        eos = torch.tensor(sorted({*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}), device=mask.device)
        last = out["completion_mask"].sum(1).clamp(min=1) - 1
        ended = torch.isin(out["completion_ids"].gather(1, last[:, None])[:, 0], eos) & (out["completion_mask"].sum(1) > 0)
        everyone = trainer.accelerator.gather
        with_text = trainer._recording() or trainer.log_completions
        return cls(
            reward=reward,
            per_function=per_function,
            group=torch.arange(len(reward), device=reward.device) // group_size,
            mask=gather_rows(trainer, mask).bool(),
            completion_ids=gather_rows(trainer, out["completion_ids"], trainer._tokenizer.pad_token_id),
            truncated=everyone(~ended),
            scores={n: gather_rows(trainer, stash[n]) for n in sorted(stash) if n not in ("rewards_per_func", "texts")},
            prompts=_gather_objects(trainer, [row["prompt"] for row in inputs]) if with_text else [],
            texts=_gather_objects(trainer, stash["texts"]) if with_text else [],
            rows=_gather_objects(trainer, [_plain(row) for row in inputs]) if with_text else [],
        )

    def rollouts(self, success_above: float) -> Rollouts:
        if self._rollouts is None:
            self._rollouts = Rollouts(reward=self.reward, group=self.group, mask=self.mask, scores=self.scores, success_above=success_above)
        return self._rollouts

    def rewrite_table(self, logs: dict, reward_names: list[str], credit: Tensor) -> None:
        """TRL's table of completions: the rollouts that are trained on, with a rollout's mean credit where TRL shows its advantage."""
        columns = {"prompt": self.prompts, "completion": self.texts, "advantages": credit.tolist()}
        for name, values in columns.items():
            logs[name].clear()
            logs[name].extend(values)
        for i, name in enumerate(reward_names):
            logs["rewards"][name].clear()
            logs["rewards"][name].extend(self.per_function[:, i].tolist())

    def record(self, trainer, rollouts: Rollouts, credit: Tensor) -> dict:
        """Everything a token view needs, as CPU tensors and lists."""
        return {
            "step": trainer.state.global_step,
            "prompts": self.prompts,
            "texts": self.texts,
            "rows": self.rows,
            "group": self.group.tolist(),
            "reward": self.reward.tolist(),
            "success": rollouts.success.tolist(),
            "truncated": self.truncated.tolist(),
            "mask": self.mask.cpu(),
            "completion_ids": self.completion_ids.cpu(),
            "scores": {n: s.float().cpu() for n, s in rollouts.scores.items()},
            "credit": credit.cpu(),
        }


def gather_rows(trainer, x: Tensor, pad=0) -> Tensor:
    """[b, t] of every process -> [N, T], right-padded to the longest, in process order."""
    accelerator = trainer.accelerator
    return accelerator.gather(accelerator.pad_across_processes(x.contiguous(), dim=1, pad_index=pad))


def draw_again(trainer, out: dict, batch: Batch) -> tuple[dict, Batch]:
    """DAPO's dynamic sampling: further rounds of fresh prompts until every group holds both outcomes, or the rounds are used up.

    All decisions are made from gathered rewards and a generator seeded by (seed, step, round), so every process makes the same. Groups
    beyond need are dropped; where too few were found, one-sided groups (no credit) fill the batch.
    """
    size, wanted = trainer.num_generations, len(batch.reward)
    pools = [(_gather_out(trainer, out), batch)]
    found = _mixed(trainer, batch)
    rounds, drawn = 1, wanted
    while len(found) < wanted and rounds < trainer.max_rounds:
        inputs = _fresh_inputs(trainer, wanted // size, rounds)
        more_out, more = trainer._roll_out(inputs)
        pools.append((_gather_out(trainer, more_out), more))
        found = torch.cat([found, _mixed(trainer, more) + drawn])
        drawn += len(more.reward)
        rounds += 1
    everything = torch.arange(drawn, device=found.device)
    spare = everything[~torch.isin(everything, found)]
    chosen = torch.cat([found, spare])[:wanted]
    log = trainer._metrics["train"]
    log["dynamic_sampling/rounds"].append(float(rounds))
    log["dynamic_sampling/drawn_groups"].append(drawn / size)
    log["dynamic_sampling/mixed_groups"].append(len(found) / size)
    log["dynamic_sampling/dropped_groups"].append((drawn - wanted) / size)
    log["dynamic_sampling/filled_groups"].append(max(wanted - len(found), 0) / size)
    return _choose(trainer, pools, chosen, rounds)


def _mixed(trainer, batch: Batch) -> Tensor:
    return batch.rollouts(trainer.success_above).mixed.nonzero()[:, 0]


def _fresh_inputs(trainer, num_prompts: int, turn: int) -> list[dict]:
    """This process's rows of a fresh draw of prompts, each repeated for its group."""
    generator = torch.Generator().manual_seed((trainer.args.seed * 1_000_003 + trainer.state.global_step) * 101 + turn)
    picks = torch.randint(len(trainer.train_dataset), (num_prompts,), generator=generator)
    rows = [i for i in picks.tolist() for _ in range(trainer.num_generations)]
    local = len(rows) // trainer.accelerator.num_processes
    start = trainer.accelerator.process_index * local
    return [dict(trainer.train_dataset[i]) for i in rows[start : start + local]]


def _gather_out(trainer, out: dict) -> dict[str, Tensor]:
    """TRL's row tensors of every process, padded; what has no rows of text alone is refused."""
    if any(out.get(k) is not None for k in ("pixel_values", "image_grid_thw", "num_images")):
        raise ValueError("dynamic sampling does not reorder images: use max_rounds=1, or a method without it")
    pad = trainer._tokenizer.pad_token_id
    gathered = {}
    for name, value in sorted(out.items()):
        if torch.is_tensor(value) and value.dim() == 2:
            value = value.flip(1) if name in LEFT else value
            value = gather_rows(trainer, value, pad if name in ("prompt_ids", "completion_ids") else 0)
            gathered[name] = value.flip(1) if name in LEFT else value
    return gathered


def _choose(trainer, pools: list[tuple[dict, Batch]], chosen: Tensor, rounds: int) -> tuple[dict, Batch]:
    pad = trainer._tokenizer.pad_token_id
    out = {
        name: _stack([o[name] for o, _ in pools], left=name in LEFT, pad=pad if name in ("prompt_ids", "completion_ids") else 0)[chosen]
        for name in pools[0][0]
    }
    batches = [b for _, b in pools]
    picks = chosen.tolist()
    batch = replace(
        batches[0],
        reward=torch.cat([b.reward for b in batches])[chosen],
        mask=_stack([b.mask for b in batches])[chosen],
        completion_ids=_stack([b.completion_ids for b in batches], pad=pad)[chosen],
        truncated=torch.cat([b.truncated for b in batches])[chosen],
        scores={n: _stack([b.scores[n] for b in batches])[chosen] for n in batches[0].scores},
        per_function=torch.cat([b.per_function for b in batches])[chosen],
        **{name: _pick([getattr(b, name) for b in batches], picks) for name in ("prompts", "texts", "rows")},
        rounds=rounds,
        _rollouts=None,
    )
    local = len(chosen) // trainer.accelerator.num_processes
    start = trainer.accelerator.process_index * local
    mine = {name: value[start : start + local] for name, value in out.items()}
    tokens = mine["completion_mask"] if "tool_mask" not in mine else mine["completion_mask"] * mine["tool_mask"]
    mine["num_items_in_batch"] = trainer.accelerator.gather(tokens.sum()).sum()
    return mine, batch


def _stack(parts: list[Tensor], left: bool = False, pad=0) -> Tensor:
    """Rows of several rounds under one width."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0) if left else (0, width - p.shape[1]), value=pad) for p in parts])


def _pick(lists: list[list], picks: list[int]) -> list:
    together = [item for part in lists for item in part]
    return [together[i] for i in picks] if together else []


def _gather_objects(trainer, values: list) -> list:
    from accelerate.utils import gather_object

    return gather_object(values)


def _plain(row: dict) -> dict:
    return {k: v for k, v in row.items() if isinstance(v, str | int | float | bool | list | dict | None)}
