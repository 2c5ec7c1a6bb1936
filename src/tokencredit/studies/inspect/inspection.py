"""What the parts of an inspection share: the log counted, the groups that are looked at closely, and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from tokencredit.lm.fingerprint import model_hash
from tokencredit.lm.policy import Policy
from tokencredit.logs import LoggedRollout
from tokencredit.method import Method
from tokencredit.stats import Estimate
from tokencredit.studies.inspect.audit import Audited
from tokencredit.studies.inspect.mismatch import excess_surprisal
from tokencredit.studies.inspect.question import InspectConfig
from tokencredit.studies.inspect.sample import LoggedStep, measure_scores, step_of_rollouts
from tokencredit.studies.inspect.source import Missing, Source, length_limit, settled
from tokencredit.studies.inspect.survey import Chosen, Survey, choose, collect, of_steps, survey
from tokencredit.studies.study import Work

FORWARD = ("logprob", "entropy")
FOREIGN = 1.0
"""Nats per token by which a step may be less likely to the checkpoint than what it would write itself."""


@dataclass
class Inspection:
    """Everything is made when it is first asked for. columns {step: {name: [B, T]}} is what the parts found of its
    tokens.
    """

    config: InspectConfig
    work: Work
    source: Source
    other: Source | None
    methods: Sequence[Method]
    notes: list[str] = field(default_factory=list)
    columns: dict[int, dict[str, Any]] = field(default_factory=dict)
    audited: Audited | None = None

    @cached_property
    def survey(self) -> Survey:
        """Stored: a large log is counted once."""
        stages, made = self.work.stages, []

        def make() -> dict[str, Any]:
            self.work.say("counting the log")
            made.append(survey(self.source.rollouts(), self.config.success_above))
            return made[0].arrays()

        arrays = stages.arrays("survey", make)
        return Survey.of_arrays(arrays, stages.value("about", lambda: made[0].about if made else self._count_again()))

    def _count_again(self) -> dict[str, Any]:
        return dict(survey(self.source.rollouts(), self.config.success_above).about)

    @cached_property
    def choice(self) -> Chosen:
        return choose(self.survey, step=self.config.step, prompts=self.config.prompts, seed=self.config.seed)

    @cached_property
    def collected(self) -> dict[int, list[LoggedRollout]]:
        self.work.say("reading the rollouts that are looked at closely")
        return collect(self.source.rollouts(), self.choice.wanted)

    @cached_property
    def policy(self) -> Policy | None:
        """The checkpoint, with the length limit of the log; None where none is named."""
        if self.config.policy is None:
            return None
        self.work.say("loading the model")
        opened = settled(self.config.policy).open()
        self.work.record.rest_on({f"the weights of {self.config.policy.model}": model_hash(opened.model)})
        [(_, logged)] = of_steps(self.collected, self.choice.groups)
        limit = length_limit(opened, self.config.policy.max_new_tokens, logged)
        return replace(opened, max_new_tokens=limit)

    def needs_policy(self, what: str) -> Policy:
        if self.policy is None:
            raise Missing(f"{what} needs the checkpoint that wrote the log, or one near it: --model CKPT")
        return self.policy

    @cached_property
    def focus(self) -> LoggedStep:
        """The step that is audited and taken apart."""
        [(step, logged)] = of_steps(self.collected, self.choice.groups)
        return self._encoded(step, logged)

    @cached_property
    def steps(self) -> list[LoggedStep]:
        """Steps spread over the log, and the focus, in their order."""
        some = [self._encoded(step, logged) for step, logged in of_steps(self.collected, self.choice.others)]
        return sorted([*(each for each in some if len(each)), self.focus], key=lambda each: each.step)

    @cached_property
    def near(self) -> LoggedStep | None:
        """Rollouts of other prompts, from the steps nearest to the focus; None where the log has none."""
        logged = [each for _, some in of_steps(self.collected, self.choice.near) for each in some]
        return self._encoded(self.choice.focus, logged, "others of step") if logged else None

    @cached_property
    def survey_of_other(self) -> Survey:
        self.work.say("counting the other log")
        return survey(self.other.rollouts(), self.config.success_above)

    @property
    def limit(self) -> int | None:
        """Tokens that a completion could have."""
        return self.policy.max_new_tokens if self.policy else None

    @property
    def limited(self) -> list[Method]:
        """The methods, for completions of that length."""
        return [method.within(self.limit) for method in self.methods] if self.limit else list(self.methods)

    @cached_property
    def excess(self) -> Estimate | None:
        """How much less likely the focus is to the checkpoint than what it would write itself, nats per token."""
        found = excess_surprisal(self.focus)
        if found is not None:
            self.work.book.enter("checkpoint/excess surprisal", found, "nats per token", over="groups")
        return found

    def rewarded(self, what: str) -> None:
        """Missing where the step has no rollout that can be looked at."""
        if not len(self.focus):
            raise Missing(
                f"{what} needs rewards, and no rollout of step {self.choice.focus} has one: say which column they are,"
                " --column reward=COLUMN"
            )

    def fits(self, what: str) -> None:
        """Missing where the checkpoint cannot have written the step."""
        if self.excess is not None and self.excess.low > FOREIGN:
            raise Missing(
                f"{what} needs the policy that wrote step {self.focus.step}, or one near it: to this checkpoint its"
                f" tokens are {self.excess.value:.1f} nats less likely than what it would write itself. It is another"
                " model, tokenizer, prompt format (--chat) or temperature (--temperature)"
            )

    def _encoded(self, step: int, logged: Sequence[LoggedRollout], name: str = "step") -> LoggedStep:
        policy = self.policy
        found = step_of_rollouts(step, logged, policy, success_above=self.config.success_above, limit=self.limit)
        for note in found.encoded.notes:
            if note not in self.notes:
                self.notes.append(note)
        if policy is None:
            return found
        self.work.say(f"log-probs and entropy of {name} {step} under the checkpoint")
        arrays = self.work.stages.arrays(
            f"scores of {name} {step}",
            lambda: {name: x.numpy() for name, x in measure_scores(policy, found, FORWARD).items()},
        )
        return replace(found, scores={name: torch.from_numpy(x) for name, x in arrays.items()})

    def side(self, source: Source, groups: frozenset[int]) -> LoggedStep:
        """These groups of a log, whatever their step."""
        logged = [each for some in collect(source.rollouts(), groups).values() for each in some]
        return step_of_rollouts(0, logged, self.policy, success_above=self.config.success_above, limit=self.limit)

    def about(self) -> dict[str, Any]:
        """What was looked at."""
        return {
            "focus": self.choice.focus,
            "steps": [{"step": each.step, "rollouts": len(each)} for each in self.steps],
            "limit": self.limit,
            "excess": "checkpoint/excess surprisal" if self.excess is not None else None,
            "temperature": self.policy.temperature if self.policy else None,
        }
