"""Loads a policy: the shipped model, a path, a hub name, or the last checkpoint of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

COMPLETE = "complete"


def resolve_model(name: str | Path) -> str:
    """A path or hub name that transformers can load. A run directory means its last whole checkpoint."""
    if str(name) == "reckon":
        from tokencredit.tasks.reckon import model_path

        return str(model_path())
    if (Path(name) / "run.json").exists():
        checkpoint = last_checkpoint(Path(name) / "checkpoints")
        if checkpoint is None:
            start = json.loads((Path(name) / "run.json").read_text())["model"]
            raise ValueError(f"the run {name} has no finished checkpoint yet; it starts from {start}")
        return str(checkpoint)
    return str(name)


def load_model(path: str) -> Any:
    """In float32 on a CPU, in the checkpoint's own dtype on a GPU."""
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if cuda else torch.float32)
    return model.to("cuda") if cuda else model


def load_tokenizer(path: str) -> Any:
    """ValueError where there is none, or where completions could not end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no tokenizer that can be loaded; save the model's tokenizer beside it ({error})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token: completions could not end. Set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def last_checkpoint(folder: Path, clean: bool = False) -> Path | None:
    """The newest checkpoint that was written to its end; with `clean`, unfinished ones are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found.append(path)
        elif clean:
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
