"""Adapters in place of all parameters: the `peft` settings of a training run as peft's own LoraConfig."""

from __future__ import annotations

import difflib
from typing import Any

from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

from tokencredit.lm.load import base_of
from tokencredit.train_config import TrainConfig

DECIDED = ("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version")
FIELDS = tuple(name for name in LoraConfig.__dataclass_fields__ if name not in DECIDED and name != "runtime_config")


def make_lora(config: TrainConfig, path: str, shape: Any) -> LoraConfig | None:
    """What TRL takes as `peft_config`; None where all parameters are trained.

    path, shape   of the model, and its configuration

    ValueError for a field that LoraConfig does not have, for target_modules that peft cannot guess, and for a model
    that is an adapter itself: without `peft`, that adapter is trained on.
    """
    if not config.peft:
        return None
    for key in config.peft:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
            known = "r, lora_alpha, lora_dropout, target_modules, use_rslora ..."
            hint = f"did you mean {near[0]}?" if near else f"it has {known}"
            raise ValueError(f"peft's LoraConfig has no field {key} that is set here; {hint}")
    rank = config.peft.get("r", LoraConfig.r)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"peft.r is the rank of the adapters, a whole number of at least 1; got {rank!r}")
    if base := base_of(path):
        raise ValueError(
            f"{config.model} is an adapter on {base} already: leave out peft.* to train it on, or merge it into its"
            " base first (peft's merge_and_unload)"
        )
    kind = getattr(shape, "model_type", None)
    if config.peft.get("target_modules") is None and kind not in KNOWN and not config.peft.get("target_parameters"):
        raise ValueError(
            f"peft does not know which layers of a {kind} model take adapters: set peft.target_modules=all-linear, or"
            " peft.target_modules='[q_proj, v_proj]'"
        )
    return LoraConfig(task_type="CAUSAL_LM", **config.peft)
