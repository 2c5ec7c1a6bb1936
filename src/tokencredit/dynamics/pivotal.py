"""Do the tokens that decide the outcome make the change of entropy? Pivotality of the step's own tokens, beside their
shares.

Where the world is small enough, exact from prefix trees: Q − V of the token written and the spread of Q over what could
have been written. Elsewhere from a stored run of `tokencredit pivotality run`, whose completions then are among the
rollouts of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokencredit.agreement.ranks import share_of_top, spearman
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.durable import read_mapping
from tokencredit.dynamics.batch import Batch, roll_out, scored
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.lm.completions import Completion
from tokencredit.lm.fingerprint import model_hash
from tokencredit.pivotality import record
from tokencredit.pivotality.exact import exact_effects

TOP = 0.2
ESTIMANDS = ("before_after", "spread")
BASELINE = "entropy"


def from_trees(checkpoint: Checkpoint, batch: Batch, num_prompts: int) -> dict[str, Tensor]:
    """{"before_after", "spread", "width"} [B, T] of the first prompts with both outcomes, up to the width of brackets;
    NaN elsewhere.
    """
    group = batch.rollouts.group_index
    chosen = torch.unique(group[batch.rollouts.mixed])[:num_prompts].tolist()
    members = [(group == prompt).nonzero()[:, 0].tolist() for prompt in chosen]
    grid = {
        name: torch.full(batch.rollouts.mask.shape, torch.nan, dtype=torch.float64) for name in (*ESTIMANDS, "width")
    }
    if not members:
        return grid
    completions = [[batch.completions[i] for i in some] for some in members]
    rows = [batch.rows[some[0]] for some in members]
    found = exact_effects(checkpoint.policy, rows, completions, alternatives=0)
    index = torch.tensor([i for some in members for i in some])
    for name, values in grid.items():
        own = values[index]
        own[batch.rollouts.mask[index]] = torch.from_numpy(found[name])
        values[index] = own
    return grid


def batch_of_run(
    checkpoint: Checkpoint, directory: str | Path, group: int, seed: int, *, needs: Sequence[str] = ()
) -> tuple[Batch, dict[str, Tensor]]:
    """Rollouts of a pivotality run's prompts, its own completions first and fresh ones up to `group`; and the effects
    {name: [B, T]}.

    NaN where a token was not measured; a token without an alternative has no effect. ValueError where the run was
    measured on another policy or at another temperature.
    """
    directory = Path(directory)
    traces, tokens = (record.read(directory, name) for name in ("traces", "tokens"))
    _same_policy(checkpoint, read_mapping(directory / "result.json", "identity")["identity"], directory)
    names = {row: i for i, row in enumerate(dict.fromkeys(trace["row"] for trace in traces))}
    rows, owner = [json.loads(row) for row in names], [names[trace["row"]] for trace in traces]
    most = max(map(owner.count, set(owner)))
    if group <= most:
        raise ValueError(
            f"{directory} has {most} completions of a prompt: ask for larger groups, --group {most + 1} or more"
        )
    fresh = roll_out(checkpoint, rows, group - most, seed)
    stored = [Completion(tuple(trace["completion_ids"]), trace["truncated"]) for trace in traces]
    others = [Completion(ids, cut) for ids, cut in zip(fresh.completions, fresh.truncated)]
    prompts = [trace["prompt_ids"] for trace in traces] + fresh.prompts
    owners = owner + fresh.rollouts.group.tolist()
    batch = scored(checkpoint, [rows[i] for i in owners], prompts, stored + others, owners, seed, needs=needs)
    grid = {name: torch.full(batch.rollouts.mask.shape, torch.nan, dtype=torch.float64) for name in ESTIMANDS}
    for token in tokens:
        for name, values in grid.items():
            value = token[name] if token["defined"] else 0.0
            values[token["trace"], token["position"]] = torch.nan if value is None else value
    return batch, grid


def _same_policy(checkpoint: Checkpoint, identity: Mapping, directory: Path) -> None:
    if identity["model_hash"] != model_hash(checkpoint.model):
        raise ValueError(
            f"{directory} was measured on another policy ({identity['model']}) than {checkpoint.path}: measure this"
            f" one, tokencredit pivotality run --model {checkpoint.path}"
        )
    if (there := identity["sampler"]["temperature"]) != checkpoint.temperature:
        raise ValueError(
            f"{directory} was measured at temperature {there}, the run samples at {checkpoint.temperature}"
        )


def carried(columns: Mapping[str, np.ndarray], share: np.ndarray, boot: Bootstrap) -> dict[str, dict]:
    """What the tokens that a column [N] puts on top carry of Σ |share|, and how the column ranks |share|.

    {"captured": {column: Estimate}, "spearman": {column: Estimate}, "compared": each column against `BASELINE`,
    paired}; the column "(itself)" is |share|: the most that any choice of as many tokens could carry.
    """
    size = np.abs(share)
    every = {name: np.abs(x) for name, x in columns.items()} | {"(itself)": size}
    draws = {name: share_of_top(x, size, TOP, boot.weights, per_token=False) for name, x in every.items()}
    ranked = {name: boot.estimate(spearman(x, size, boot.weights)) for name, x in every.items() if name != "(itself)"}
    compared = compare(boot, {name: x for name, x in draws.items() if name != "(itself)"}, BASELINE)
    return {"captured": {name: boot.estimate(x) for name, x in draws.items()}, "spearman": ranked, "compared": compared}
