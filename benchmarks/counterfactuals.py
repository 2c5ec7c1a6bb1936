"""Predicted against real changes of entropy and reward, for the steps that other methods would make from the same
rollouts.

The part of each method's step that the rollouts make is taken at GRPO's length, four times over so that samples resolve
it, and the
moved policies answer 2,048 other prompts with the uniforms of the policy that was not moved.
                                                                                   python benchmarks/counterfactuals.py
"""

import numpy as np

from _checkpoint import trained_run
from _result import finish
from tokencredit.dynamics.attribution import draw_goals
from tokencredit.dynamics.batch import draw, prompts_of
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.counterfactual import Coefficients, consequences, named_method
from tokencredit.dynamics.exchange import Change
from tokencredit.dynamics.update import step_along
from tokencredit.dynamics.vectors import moved, norm
from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.prompts import encode_prompts
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.stats import mean_of_units

METHODS = ("grpo", "entropy_advantage", "gtpo", "forking_tokens", "ptw_entropy")
PROMPTS, SAMPLES, FACTOR = 2048, 4, 4.0


def sampled(c, rows):
    """Entropy, tokens and successes [P] of fresh completions by the model as it is; equal uniforms for every policy."""
    prompts = [
        Trace(tuple(prompt))
        for prompt in encode_prompts(c.tokenizer, rows, c.model.config, c.max_new_tokens, chat=None)
    ]
    sampler = PrefixSampler(c.model, ends=end_tokens(c.model, c.tokenizer), settings=Settings(c.temperature))
    requests = [
        Request(i, 0, c.max_new_tokens, seed_of("fresh", i, k)) for i in range(len(rows)) for k in range(SAMPLES)
    ]
    found = np.zeros((3, len(rows)))
    for index, rollout in sampler.continue_(prompts, requests):
        row = rows[index // SAMPLES]
        right = c.task.verify(
            c.tokenizer.decode(list(rollout.ids), skip_special_tokens=True), row, rollout.truncated
        ).correct
        found[:, index // SAMPLES] += sum(rollout.entropy), len(rollout.ids), right / SAMPLES
    return found


def influence(found):
    """[2, P]: mean token entropy and success rate, prompt by prompt: their means are the estimates."""
    entropy, tokens, right = found
    mean = entropy.sum() / tokens.sum()
    return np.stack([mean + (entropy - mean * tokens) / tokens.mean(), right])


def main():
    figures = {}
    with trained_run(steps=10) as run:
        c = open_checkpoint(run)
        batch, goals, rows = draw(c, 64, 8, seed=0), draw_goals(c, 0), prompts_of(c, PROMPTS, 77)
        before = influence(sampled(c, rows))
        predicted, real, length = {}, {}, None
        for name in METHODS:
            own = Coefficients.of(named_method(name).within(c.max_new_tokens), batch)
            update = step_along(c, own.batch, own.value, own.credit)
            length = length or norm(update.fresh)
            predicted[name] = Change.of(consequences(c, own, batch, goals), "equal", length)
            with moved(update.passes.parameters, update.fresh, FACTOR * length / norm(update.fresh)):
                real[name] = (influence(sampled(c, rows)) - before) / FACTOR
            for place, goal in enumerate(goals):
                enter(figures, name, goal, predicted[name].estimate(goal), real[name][place])
                if name != METHODS[0]:
                    gap = (predicted[name] - predicted[METHODS[0]]).estimate(goal)
                    enter(figures, f"{name} less {METHODS[0]}", goal, gap, real[name][place] - real[METHODS[0]][place])
    finish(
        "counterfactuals",
        {"figures": figures, "step": c.step, "seed": 0, "command": "python benchmarks/counterfactuals.py"},
    )


def enter(figures, name, goal, predicted, real):
    measured = mean_of_units(real)
    figures[f"{name}/{goal}"] = {
        kind: {key: 1e3 * getattr(each, key) for key in ("value", "low", "high")}
        for kind, each in (("predicted", predicted), ("real", measured))
    }
    print(
        f"{name:32s} {goal:8s} predicted {1e3 * predicted.value:7.3f}, real {1e3 * measured.value:7.3f} "
        f"[{1e3 * measured.low:.3f}, {1e3 * measured.high:.3f}] thousandths",
        flush=True,
    )


if __name__ == "__main__":
    main()
