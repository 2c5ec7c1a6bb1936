"""Scores that the engine computes at rollout time: uniform draws, sums of squares, and what the task knows."""

from types import SimpleNamespace

import pytest
import torch

from tokencredit import METHODS
from tokencredit.engines.scorers import uniform
from tokencredit.preference import PREFERENCES
from tokencredit.scores.table import SCORES, UNMEASURED, available, check_available


def trainer_of(seed=0, step=0, process=0):
    """What a scorer reads of a trainer."""
    args, state, accelerator = (
        SimpleNamespace(seed=seed),
        SimpleNamespace(global_step=step),
        SimpleNamespace(process_index=process),
    )
    return SimpleNamespace(args=args, state=state, accelerator=accelerator)


def batch_of(size, width):
    ones = torch.ones(size, width, dtype=torch.long)
    return {"completion_ids": ones, "completion_mask": ones}


def test_uniforms_are_uniform_and_unrelated():
    """Mean 1/2, variance 1/12 within 4 standard errors; neighbours in a row, in a column, in step and in seed are
    uncorrelated.
    """
    n = 400 * 250
    drawn = {key: uniform(trainer_of(*key), [], batch_of(400, 250)).double() for key in ((0, 0), (0, 1), (1, 0))}
    u = drawn[0, 0]
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for other in (u.roll(1, 0), u.roll(1, 1), drawn[0, 1], drawn[1, 0]):
        assert abs(((u - 0.5) * (other - 0.5)).mean()) < 4 / 12 / n**0.5


def test_uniforms_do_not_depend_on_width_or_processes():
    whole = uniform(trainer_of(), [], batch_of(8, 6))
    assert torch.equal(uniform(trainer_of(), [], batch_of(8, 9))[:, :6], whole)
    halves = [uniform(trainer_of(process=k), [], batch_of(4, 6)) for k in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)


def test_scores_that_nobody_measures_are_named_as_such():
    with pytest.raises(ValueError, match=r"implicit_reward \(log π_r − .* is measured by nobody here: CreditTrainer"):
        check_available(["entropy", "implicit_reward"], None)
    assert not SCORES.keys() & UNMEASURED.keys() and not available(None) & UNMEASURED.keys()
    given = set().union(*(method.needs for method in METHODS.values()), *(m.needs for m in PREFERENCES.values()))
    assert given <= SCORES.keys() | UNMEASURED.keys()  # every score that a method reads is said to be something
