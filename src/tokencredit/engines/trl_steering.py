"""Methods that steer a coefficient by what they see (`Method.after`), across rollout batches, processes and
checkpoints.
"""

from __future__ import annotations

from typing import Any

from tokencredit.engines.trl_carried import read_carried, write_carried
from tokencredit.lm.models import CausalModel
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

FILE = "steered.json"


class Steered:
    """Mixin of a trainer: `method` is that of the next rollout batch, `_start` the one it was given.

    The step is a function of the whole gathered batch, so it is the same on every process; the state is in the
    checkpoint.
    """

    method: Method
    _start: Method
    _metrics: Any

    def _steer(self, rollouts: Rollouts) -> None:
        """On to the next method; logs the values that this batch was given credit with."""
        then, own = self.method.after(rollouts), self.method.hyperparameters()
        for name in then.state(self.method) | self.method.state(self._start):
            self._metrics["train"][f"steered/{name}"].append(float(own[name]))
        self.method = then

    def _save_checkpoint(self, model: CausalModel, trial):
        super()._save_checkpoint(model, trial)
        write_carried(self, trial, FILE, self.method.state(self._start))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if state := read_carried(checkpoint, FILE):
            self.method = self._start.replace(**state)
