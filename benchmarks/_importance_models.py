"""Models and batches on which the importance benchmarks run: seeded, offline, trained for a moment on Python's own
source.
"""

import sysconfig
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 1024


def text_ids(num: int = 400_000) -> torch.Tensor:
    """Token ids of standard-library source: its most frequent words and symbols, everything else as characters."""
    import collections
    import re

    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))[:60])
    pieces = re.findall(r"[A-Za-z]+| +|\n|[^A-Za-z \n]", text)
    common = [piece for piece, _ in collections.Counter(pieces).most_common(VOCABULARY - 2)]
    number = {piece: i + 2 for i, piece in enumerate(common)}
    return torch.tensor([number.get(piece, 1) for piece in pieces][:num])


def make_model(size: str, seed: int = 0, **options) -> Qwen2ForCausalLM:
    """ "1M" or "10M" parameters, untied embeddings."""
    width, layers, inner = {"1M": (128, 4, 256), "10M": (384, 6, 1024)}[size]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **{"tie_word_embeddings": False} | options,
    )
    return Qwen2ForCausalLM(config)


def train(model, ids: torch.Tensor, steps: int, length: int = 128, rows: int = 8, seed: int = 0) -> float:
    """Teach next-token prediction; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = windows(ids, rows, length, generator)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def windows(ids: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(ids) - length, (rows,), generator=generator).tolist()
    return torch.stack([ids[start : start + length] for start in starts])
