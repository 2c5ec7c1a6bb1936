"""A language model that TRL trains in milliseconds, its prompts and rewards, and rollouts that are the same wherever
they are drawn.
"""

import gc
import os
import random
from contextlib import nullcontext

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_groups import gather_rows

torch.set_num_threads(1)
logging.set_verbosity_error()
gc.freeze()  # every train() of transformers collects garbage: not among all that was just imported

VOCAB = ["<pad>", "<eos>", *"0123456789", "+", "="]
PAD, EOS = 0, 1
LONGEST = 8
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}={% endif %}"


def tiny_tokenizer():
    inner = Tokenizer(models.WordLevel({v: i for i, v in enumerate(VOCAB)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def sums(number=36):
    """Prompts "a + b =" and longer, with a column of their own."""
    return Dataset.from_list(
        [{"prompt": f"{i % 6} + {i // 6 % 10}{' + 1' * (i % 4)} =", "index": i} for i in range(number)]
    )


def reward(completions, **_):
    """1 where the completion holds a 3 or a 7."""
    return [float(any(digit in _text(c) for digit in "37")) for c in completions]


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


PLAIN = {
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
    "use_cpu": True,
    "max_grad_norm": 0.0,
    "log_level": "error",
}
"""Training without anything that would blur a comparison, or be written."""


def settings(folder, **changes):
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=LONGEST,
        max_steps=2,
        learning_rate=0.05,
        temperature=1.0,
        generation_kwargs={"suppress_tokens": [PAD]},
    )
    return GRPOConfig(**PLAIN | values | changes)


def build(cls, folder, changes=None, **keywords):
    """A trainer of class `cls`; `changes` to GRPOConfig, keywords to the trainer."""
    keywords = {
        "model": None,
        "reward_funcs": reward,
        "train_dataset": sums(),
        "processing_class": tiny_tokenizer(),
    } | keywords
    keywords["model"] = keywords["model"] or tiny_model()
    return cls(args=settings(folder, **changes or {}), **keywords)


def train(cls, folder, changes=None, **keywords):
    trainer = build(cls, folder, changes, **keywords)
    trainer.train()
    return trainer


def steps(trainer):
    """The logged records of the optimizer steps."""
    return [record for record in trainer.state.log_history if "loss" in record]


def weights(trainer):
    """All parameters in one vector, gathered where processes hold parts of them."""
    found = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    with _gathered(found):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]
        return torch.cat([p.detach().flatten().double() for p in whole])


def _gathered(parameters):
    """ZeRO-3's, where each holds nothing until it is asked for."""
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def written(prompt, place, turn):
    """Token ids of the completion of a prompt at a place in its group: ragged, ended by <eos> unless it has full
    length.
    """
    draw = random.Random(f"{prompt} {place} {turn}")
    ids = [draw.randrange(2, 12) for _ in range(draw.randint(0, LONGEST))]
    return ids if len(ids) == LONGEST else [*ids, EOS]


class Fixed:
    """Completions that depend on the prompt, the place in the group and the optimizer step alone, not on processes or
    random states.

    Keeps what the loss is given: `kept` holds, per rollout batch, the rows of all processes, `asked` the prompts of
    this one.
    """

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        places = [(first + i) % self.num_generations for i in range(len(prompt_ids))]
        return [written(ids, place, self.state.global_step) for ids, place in zip(prompt_ids, places)], None

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if not hasattr(self, "kept"):
            self.kept, self.asked = [], []
        names = ("completion_ids", "completion_mask", "advantages", "token_weight", "coefficient")
        self.kept.append({n: gather_rows(self, out[n].double()) for n in names if n in out and out[n].dim() == 2})
        prompts = zip(out["prompt_ids"], out["prompt_mask"].bool())
        self.asked.append([self.processing_class.decode(ids[mask]) for ids, mask in prompts])
        return out


class FixedCredit(Fixed, CreditTrainer):
    """CreditTrainer on fixed completions."""


class FixedStock(Fixed, GRPOTrainer):
    """Stock TRL on fixed completions."""
