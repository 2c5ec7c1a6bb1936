"""TRL on GSM8K with credit per token. Any other argument of GRPOConfig (vLLM, DeepSpeed, PEFT, ...) is TRL's own.

python examples/train_gsm8k_trl.py --model Qwen/Qwen2.5-0.5B-Instruct --data data/gsm8k --method gtpo
"""

import argparse

import torch
from datasets import Dataset
from trl import GRPOConfig

import tokencredit as tc
from tokencredit import tasks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", help="a directory with train*.jsonl, or one file; without it, from the hub")
parser.add_argument("--method", default="gtpo", choices=tc.METHODS)
parser.add_argument("--out", default="runs/gsm8k")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--max-completion-length", type=int, default=512)
args = parser.parse_args()

task = tasks.load("gsm8k", path=args.data, template="boxed")


def correct(completions, answer, **_):
    return [float(task.verify(text, {"answer": gold}).correct) for text, gold in zip(completions, answer)]


config = GRPOConfig(
    args.out,
    max_steps=args.steps,
    bf16=torch.cuda.is_available(),
    max_completion_length=args.max_completion_length,
)
data = Dataset.from_list(task.rows("train"))
tc.CreditTrainer(args.model, correct, config, method=args.method, train_dataset=data).train()
