"""Loads a policy: the shipped model, a path, a hub name, or the last checkpoint of a run; each may be an adapter (LoRA)
on a base model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tokencredit import hub
from tokencredit.checkpoints import check, newest
from tokencredit.durable import DamagedFile, read_mapping
from tokencredit.lm.models import CausalModel, Tokenizer

EMBEDDED = "reckon"
"""The task and the model that the package ships."""
ADAPTER = "adapter_config.json"
"""What a folder with an adapter holds in place of a model's config.json."""


def resolve_model(name: str | Path) -> str:
    """A path or hub name that transformers can load. A run directory means its last whole checkpoint; a damaged one is
    named in a warning, and DamagedFile where it was asked for itself.
    """
    if str(name) == EMBEDDED:
        from tokencredit.tasks.reckon import model_path

        return str(model_path())
    path = Path(name)
    if (path / "run.json").exists():
        checkpoint = newest(path / "checkpoints")
        if checkpoint is None:
            start = read_mapping(path / "run.json", "model")["model"]
            raise ValueError(f"the run {name} has no finished checkpoint yet; it starts from {start}")
        return str(checkpoint)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", ADAPTER)):
        raise ValueError(f"{name} is a directory without a model (config.json) and without a run (run.json)")
    if not path.exists() and _is_path(name):
        raise ValueError(
            f"no such model: {name} (a model is a directory, a run directory, a hub name like Qwen/Qwen2.5-0.5B, or"
            " reckon)"
        )
    check(path)
    return str(name)


def _is_path(name: str | Path) -> bool:
    """Whether it cannot be a hub name."""
    return Path(name).is_absolute() or str(name).startswith(".") or len(Path(name).parts) > 2


def run_of(model: str | Path) -> Path | None:
    """The directory of the training run that a model is of: the directory itself, or that of its checkpoint."""
    path = Path(model)
    for folder in (path, path.parent.parent):
        if (folder / "run.json").is_file() and (folder == path or path.parent.name == "checkpoints"):
            return folder
    return None


def base_of(path: str | Path) -> str | None:
    """The base model of a folder with an adapter, as transformers can load it; None for any other model.

    ValueError names a base that is not where it was when the adapter was trained; the shipped model is found wherever
    the package is now.
    """
    if not (Path(path) / ADAPTER).is_file():
        return None
    base = str(read_mapping(Path(path) / ADAPTER, "base_model_name_or_path")["base_model_name_or_path"])
    if Path(base).exists() or not _is_path(base):
        return base
    run = run_of(path)
    if run and read_mapping(run / "run.json", "model")["model"] == EMBEDDED:
        return resolve_model(EMBEDDED)
    raise ValueError(
        f"{path} is an adapter of the model {base}, which is not there any more: move it back, or put a link to it"
        f" there (ln -s NEW_PLACE {base})"
    )


def _ready(path: str) -> None:
    """Before anything is loaded by its hub name: without the hub, ValueError at once where the cache does not hold
    it.
    """
    if Path(path).exists() or hub.reachable():
        return
    from huggingface_hub import try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(path, file), str) for file in ("config.json", ADAPTER)):
        raise ValueError(hub.without(f"the model {path}", "name a directory that holds the model"))


def called(name: str) -> str:
    """A model for a line of text: as the user called it, with the base where it is an adapter."""
    base = base_of(path := resolve_model(name))
    if base is None:
        return name
    shipped = Path(base) == Path(resolve_model(EMBEDDED))
    return f"{name} (adapter {Path(path).name} on {EMBEDDED if shipped else base})"


def load_config(path: str) -> Any:
    """The model's configuration alone, without its weights; of an adapter, its base model's."""
    path = base_of(path) or path
    _ready(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the model {path} cannot be loaded: {_first_line(error)}") from error


@dataclass(frozen=True)
class Outline:
    """What can be told of a model without its weights, for a process that leaves the model to others."""

    config: Any
    generation_config: Any


def load_outline(path: str) -> Outline:
    """The outline of a model; of an adapter, its base model's."""
    config, base = load_config(path), base_of(path) or path
    try:
        return Outline(config, GenerationConfig.from_pretrained(base))
    except OSError:  # as transformers has it where there is no such file
        return Outline(config, GenerationConfig.from_model_config(config))


def outlined(name: str) -> CausalModel:
    """A model's parameters by name and shape, in float32, with no memory behind them."""
    config = load_config(resolve_model(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_model(path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | None = None) -> CausalModel:
    """The model in evaluation mode; an adapter on its base model, of which only the adapter's parameters require
    gradients.

    dtype      by default float32 on a CPU and the checkpoint's own elsewhere
    device     by default a GPU where there is one

    ValueError where the device or an adapter's base is not there, or the dtype is none of torch's.
    """
    place = find_device(device)
    kind = dtype or ("float32" if place.type == "cpu" else "auto")
    if isinstance(kind, str) and kind != "auto":
        kind = getattr(torch, kind, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"no dtype is called {dtype!r}; there are auto, float32, bfloat16, float16 and float64")
    return read_model(str(path), dtype=kind).to(place).eval()


def read_model(path: str, **options: Any) -> CausalModel:
    """`AutoModelForCausalLM.from_pretrained(path, ...)`, or that of an adapter's base with the adapter on it."""
    base = base_of(path)
    _ready(base or path)
    model = _read_weights(base or path, AutoModelForCausalLM.from_pretrained, **options)
    if base is None:
        return model
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} is an adapter, which needs peft: pip install 'tokencredit[trl]'") from error
    adapted = partial(PeftModel.from_pretrained, model, is_trainable=True)
    return _read_weights(path, adapted)


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


def _read_weights(path: str, read: Callable[..., Any], **options: Any) -> Any:
    """`read(path, ...)`; DamagedFile names the folder where the file of the weights is damaged."""
    try:
        return read(path, **options)
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError", "EOFError", "BadZipFile"):
            raise
        raise DamagedFile(
            f"the weights in {path} cannot be read ({type(error).__name__}: {_first_line(error)}): copy the model again"
        ) from error


def load_tokenizer(path: str) -> Tokenizer:
    """A model's tokenizer, padding with the end of text where the model has no token for it; of an adapter without one,
    its base model's. ValueError where there is none, or where completions could not end.
    """
    if (base := base_of(path)) and not (Path(path) / "tokenizer_config.json").exists():
        path = base
    _ready(path)
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
    try:
        size = load_config(path).get_text_config().vocab_size
    except ValueError:  # a tokenizer alone
        size = len(tokenizer)
    if tokenizer.eos_token_id >= size:
        raise ValueError(
            f"the end-of-sequence token of {path}, {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), is none of the"
            f" model's {size} tokens: completions could not end. Set tokenizer.eos_token, or resize the embedding"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
