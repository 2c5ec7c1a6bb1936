"""Pairs as the preference trainer reads them: token ids, what was measured on every token, and what a pair weighs.

A row has `prompt_ids`, `chosen_ids` and `rejected_ids`; for a score called x, `chosen_x` and `rejected_x` with a number
per token; and, where pairs count differently, `weight`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

SIDES = ("chosen", "rejected")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
WEIGHT = "weight"


def score_columns(names: Iterable[str]) -> list[str]:
    """The columns that hold scores of these names."""
    return [f"{side}_{name}" for name in sorted(names) for side in SIDES]


def has_ids(row: Mapping[str, Any]) -> bool:
    """Whether a row is tokenized already."""
    return all(name in row for name in IDS)


@dataclass(frozen=True)
class _Fits:
    """Whether a row leaves a token of either side within the length limit; ValueError names one that is no pair."""

    scores: tuple[str, ...]
    max_length: int | None

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        if empty := [name for name in IDS if not row[name]]:
            raise ValueError(f"pair {index} has no tokens in {', '.join(empty)}")
        for side in SIDES:
            num = len(row[f"{side}_ids"])
            for name in self.scores:
                if len(row[f"{side}_{name}"]) != num:
                    raise ValueError(
                        f"pair {index} has {len(row[f'{side}_{name}'])} numbers in {side}_{name} for {num} tokens in"
                        f" {side}_ids: one for each token"
                    )
        return self.max_length is None or len(row["prompt_ids"]) < self.max_length


def checked_pairs(dataset: Dataset | IterableDataset, scores: Sequence[str], max_length: int | None):
    """The dataset's pairs whose prompt leaves room within `max_length`; what is left out is said.

    ValueError names a pair that is empty, or has not one number per token, and says where none is left.
    """
    kept = dataset.filter(_Fits(tuple(scores), max_length), with_indices=True)
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        told = f"the prompts of {len(dataset) - len(kept)} of {len(dataset)} pairs fill max_length={max_length}"
        if not len(kept):
            raise ValueError(f"{told}: no token to train on is left. Raise max_length")
        warnings.warn(f"{told}; these pairs are left out. Raise max_length to train on them", stacklevel=2)
    return kept


def with_mean_weight_one(dataset: Dataset | IterableDataset):
    """The dataset with weights of mean one, so that a micro-batch's part of the loss does not depend on the others."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'a column "{WEIGHT}" needs a dataset with a length, whose mean is known: load it whole')
    weight = torch.tensor(dataset[:][WEIGHT], dtype=torch.float64)
    if not (torch.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0):
        raise ValueError(f'the column "{WEIGHT}" must be finite, not negative, and not all 0')
    return dataset.remove_columns(WEIGHT).add_column(WEIGHT, (weight / weight.mean()).tolist())


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's batch of pairs, and beside it `score_x` [2P, L], aligned with `input_ids`, for every score x that the rows
    hold, and `weight` [P].
    """

    scores: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        for name in self.scores:
            rows = [
                torch.tensor(([0.0] * len(row["prompt_ids"]) + list(row[f"{side}_{name}"]))[: self.max_length])
                for side in SIDES
                for row in examples
            ]
            batch[f"score_{name}"] = pad(
                rows, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
            )
        if WEIGHT in examples[0]:
            batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in examples])
        return batch
