"""The pretrained model of the benchmarks, SmolLM2-135M-Instruct, and a few prompts for it."""

import os
from pathlib import Path

MODEL = os.environ.get("TOKENCREDIT_PRETRAINED", str(Path(__file__).parents[1] / "runs" / "smollm2"))
ITEMS = ("apples", "pens", "books", "coins", "eggs", "shells", "cards", "stones")


def model_path() -> str:
    """Where it is; told how to get it where it is absent."""
    if not (Path(MODEL) / "config.json").exists():
        raise SystemExit(f"{MODEL} is not there: make pretrained (or name its folder in TOKENCREDIT_PRETRAINED)")
    return MODEL


def problems(num: int) -> list[str]:
    """Word problems of one step."""
    return [
        f"Tom has {2 + i % 8} {ITEMS[i % len(ITEMS)]} and gets {2 + (3 * i) % 7} more. How many has he now?"
        " Answer in one short sentence."
        for i in range(num)
    ]


def chat(tokenizer, text: str) -> list[int]:
    """Token ids of a user's message."""
    asked = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"])
