"""slime: the credit of a `Method` as its `--custom-advantage-function-path`.

    --custom-advantage-function-path tokencredit.engines.slime.credit
    --custom-config-path method.yaml        # tokencredit: {method: gtpo, method_options: {alpha: [1, 0.2]}}
    --use-rollout-entropy --disable-rewards-normalization --calculate-per-token-loss --eps-clip 0.2 --eps-clip-high 0.28

The loss stays slime's, PPO's clip, so a method is refused whose surrogate or aggregate slime's options do not give.
Written from slime's source and tested on its data layout; not run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.objective import Clip, SequenceMean, TokenMean
from tokencredit.rollouts import Rollouts

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class _Row:
    """A rollout as slime's lists hold it: tensors of its response, on the CPU."""

    index: int
    reward: float
    mask: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)


def credit(args: Namespace, rollout_data: dict[str, Any], gather: Gather | None = None) -> None:
    """Writes `advantages` and `returns` into `rollout_data`: one tensor [R] per rollout of this data-parallel rank.

    args          slime's arguments; `args.tokencredit` comes from --custom-config-path
    rollout_data  lists per rollout of this rank: "rewards", "loss_masks", "log_probs" (with their entropies in
                  "entropy"), "sample_indices"; a group is the n_samples_per_prompt indices of one prompt
    gather        an object of this rank -> those of all data-parallel ranks, in their order; Megatron's group unless
                  given. Groups that a partition has split are whole again, and statistics are those of the batch.

    ValueError names the option of slime that contradicts the method.
    """
    method = method_of(args)
    log_probs = rollout_data.get("log_probs")
    if log_probs is None:  # an intermediate pipeline stage, which has no log-probs and takes no part
        return
    mine = _rows(args, rollout_data, method)
    ranks = (gather or _gather)(mine)
    rows = [row for rank in ranks for row in rank]
    _check_groups([row.index // args.n_samples_per_prompt for row in rows], args.n_samples_per_prompt)
    found = dict(zip((row.index for row in rows), method.credit(_rollouts(rows, args.n_samples_per_prompt))))
    assigned = [found[row.index][: len(row.mask)].to(x) for row, x in zip(mine, log_probs)]
    rollout_data["advantages"] = assigned
    rollout_data["returns"] = [x.clone() for x in assigned]


def method_of(args: Namespace) -> Method:
    """The method that `args.tokencredit` names, for slime's completion budget, held against slime's loss."""
    section = getattr(args, "tokencredit", None)
    if not isinstance(section, Mapping) or "method" not in section:
        raise ValueError(
            "slime's arguments name no method: give --custom-config-path a YAML file with tokencredit: {method: gtpo}"
        )
    unknown = sorted(set(section) - {"method", "method_options"})
    if unknown:
        raise ValueError(f"tokencredit: unknown key {unknown[0]}. Keys: method, method_options")
    method = METHODS[section["method"]].configured(section.get("method_options", {}))
    method = method.within(args.rollout_max_response_len)
    faults = _faults(args, method)
    if faults:
        raise ValueError(f'method "{method.name}" and these options of slime:\n' + "\n".join(faults))
    return method


def _faults(args: Namespace, method: Method) -> list[str]:
    faults = []
    if args.rewards_normalization:
        faults.append("rewards are normalised before the method sees them: --disable-rewards-normalization")
    if args.normalize_advantages:
        faults.append("--normalize-advantages would change the credit: leave it out")
    if args.kl_coef:
        faults.append(f"--kl-coef {args.kl_coef} belongs to slime's own estimators: --use-kl-loss has a KL term")
    if getattr(args, "context_parallel_size", 1) > 1:
        faults.append("--context-parallel-size splits completions over ranks: 1 is needed")
    if "entropy" in method.needs and not args.use_rollout_entropy:
        faults.append("it needs entropies: --use-rollout-entropy")
    unknown = sorted(method.needs - {"entropy", "logprob"})
    if unknown:
        faults.append(f"it needs the scores {', '.join(unknown)}, which slime does not have: choose another method")
    clip = method.surrogate
    if type(clip) is not Clip or clip.dual is not None:
        faults.append(f"its loss is {type(clip).__name__}, and slime's is PPO's clip: choose a method with Clip")
    elif (clip.low, clip.high) != (args.eps_clip, args.eps_clip_high):
        faults.append(f"its clip is --eps-clip {clip.low} --eps-clip-high {clip.high}")
    if type(method.aggregate) is TokenMean and not args.calculate_per_token_loss:
        faults.append("its tokens count the same: --calculate-per-token-loss")
    elif type(method.aggregate) is SequenceMean and args.calculate_per_token_loss:
        faults.append("its rollouts count the same: leave out --calculate-per-token-loss")
    elif type(method.aggregate) not in (TokenMean, SequenceMean):
        faults.append(f"slime has no aggregation like {type(method.aggregate).__name__}: choose another method")
    return faults


def _rows(args: Namespace, data: Mapping[str, Any], method: Method) -> list[_Row]:
    sources = {"logprob": data["log_probs"], "entropy": data.get("entropy")}
    columns = {name: sources[name] for name in sorted(method.needs)}
    missing = [name for name, column in columns.items() if column is None]
    if missing:
        raise ValueError(f"slime's rollout data hold no {missing[0]}; they hold: {', '.join(sorted(data))}")
    rows = []
    for k, mask in enumerate(data["loss_masks"]):
        mask = torch.as_tensor(mask).cpu().bool()
        scores = {name: column[k].detach().cpu().float() for name, column in columns.items()}
        lengths = {name: len(x) for name, x in scores.items() if len(x) != len(mask)}
        if lengths:
            raise ValueError(f"rollout {k} has {len(mask)} response tokens, and {lengths}: completions must be whole")
        rows.append(_Row(int(data["sample_indices"][k]), float(data["rewards"][k]), mask, scores))
    return rows


def _check_groups(groups: list[int], size: int) -> None:
    odd = {group: groups.count(group) for group in groups if groups.count(group) != size}
    if odd:
        group, count = next(iter(odd.items()))
        raise ValueError(
            f"group {group} has {count} of its {size} rollouts on the ranks that were gathered: give `gather` for all"
            " data-parallel ranks, or let every group stay on one"
        )


def _rollouts(rows: list[_Row], size: int) -> Rollouts:
    def padded(columns: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)

    names = rows[0].scores if rows else {}
    return Rollouts(
        torch.tensor([row.reward for row in rows]),
        torch.tensor([row.index // size for row in rows]),
        padded([row.mask for row in rows]),
        {name: padded([row.scores[name] for row in rows]) for name in names},
    )


def _gather(x: Any) -> list[Any]:
    """The objects of all data-parallel ranks of Megatron; of this process alone where nothing is distributed."""
    if not torch.distributed.is_initialized():
        return [x]
    from megatron.core import mpu

    group = mpu.get_data_parallel_group(with_context_parallel=False)
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, x, group=group)
    return found
