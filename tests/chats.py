"""The shipped model with a chat template of a test's own."""

import shutil
from pathlib import Path

from tokencredit.lm.load import load_tokenizer
from tokencredit.tasks.reckon import model_path


def chat_model_in(folder: Path, template: str) -> str:
    """Its path, in a folder that is made."""
    shutil.copytree(model_path(), folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)
