"""Loads a policy: the shipped model, a path, a hub name, or the last checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tokencredit.checkpoints import check, newest
from tokencredit.durable import DamagedFile, read_mapping
from tokencredit.lm.models import CausalModel, Tokenizer


def resolve_model(name: str | Path) -> str:
    """A path or hub name that transformers can load. A run directory means its last whole checkpoint; a damaged one is
    named in a warning, and DamagedFile where it was asked for itself.
    """
    if str(name) == "reckon":
        from tokencredit.tasks.reckon import model_path

        return str(model_path())
    path = Path(name)
    if (path / "run.json").exists():
        checkpoint = newest(path / "checkpoints")
        if checkpoint is None:
            start = read_mapping(path / "run.json", "model")["model"]
            raise ValueError(f"the run {name} has no finished checkpoint yet; it starts from {start}")
        return str(checkpoint)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{name} is a directory without a model (config.json) and without a run (run.json)")
    if not path.exists() and (path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2):
        raise ValueError(
            f"no such model: {name} (a model is a directory, a run directory, a hub name like Qwen/Qwen2.5-0.5B, or"
            " reckon)"
        )
    check(path)
    return str(name)


def load_config(path: str) -> Any:
    """The model's configuration alone, without its weights."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the model {path} cannot be loaded: {_first_line(error)}") from error


def load_model(
    path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | None = None, trainable: bool = False
) -> CausalModel:
    """The model in evaluation mode; of an adapter, with its base model.

    dtype      by default float32 on a CPU and the checkpoint's own elsewhere
    device     by default a GPU where there is one
    trainable  whether an adapter's own parameters require gradients, as in its training

    ValueError where the device is not there, or the dtype is none of torch's.
    """
    place = find_device(device)
    kind = dtype or ("float32" if place.type == "cpu" else "auto")
    if isinstance(kind, str) and kind != "auto":
        kind = getattr(torch, kind, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"no dtype is called {dtype!r}; there are auto, float32, bfloat16, float16 and float64")
    if trainable and (Path(path) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = read_weights(str(path), AutoPeftModelForCausalLM, is_trainable=True, dtype=kind)
    else:
        model = read_weights(str(path), AutoModelForCausalLM, dtype=kind)
    return model.to(place).eval()


def find_device(name: str | None = None) -> torch.device:
    """The device of that name, by default a GPU where there is one; ValueError where it is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name not in there:
        raise ValueError(f"--device: there is no device {name!r} here; there are: {', '.join(there)}")
    return torch.device(name)


def read_weights(path: str, kind: Any, **options: Any) -> Any:
    """`kind.from_pretrained(path, ...)`; DamagedFile names the folder where the file of the weights is damaged."""
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError", "EOFError", "BadZipFile"):
            raise
        raise DamagedFile(
            f"the weights in {path} cannot be read ({type(error).__name__}: {_first_line(error)}): copy the model again"
        ) from error


def load_tokenizer(path: str) -> Tokenizer:
    """ValueError where there is none, or where completions could not end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = (
            "save the model's tokenizer beside it"
            if Path(path).is_dir()
            else "is the name right, and can the hub be reached?"
        )
        raise ValueError(f"{path} has no tokenizer that can be loaded; {advice} ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} has no end-of-sequence token: completions could not end. Set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
