"""Methods that steer a coefficient by what they see (`Method.after`), across rollout batches, processes and
checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    args: Any
    state: Any
    _start: Method
    _metrics: Any
    _get_output_dir: Any

    def _steer(self, rollouts: Rollouts) -> None:
        """On to the next method; logs the values that this batch was given credit with."""
        then, own = self.method.after(rollouts), self.method.hyperparameters()
        for name in then.state(self.method) | self.method.state(self._start):
            self._metrics["train"][f"steered/{name}"].append(float(own[name]))
        self.method = then

    def _save_checkpoint(self, model: CausalModel, trial):
        super()._save_checkpoint(model, trial)
        state = self.method.state(self._start)
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / FILE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / FILE).exists():
            self.method = self._start.replace(**json.loads(path.read_text()))
