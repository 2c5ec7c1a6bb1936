"""Your own trainer, method and adapters, and a run directory all the same: `report`, `evaluate` and `dynamics` read it.

python examples/record_run.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --out runs/mine
tokencredit report runs/mine && tokencredit evaluate --model runs/mine
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

import tokencredit as tc
from tokencredit.lm.load import resolve_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="reckon")
parser.add_argument("--task", default="reckon")
parser.add_argument("--out", default="runs/mine")
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

recorder = tc.RunRecorder(args.out, args.task, eval_every=2, eval_prompts=16, eval_samples=2)
task, data = recorder.task, Dataset.from_list(recorder.task.rows("train", 64))
grpo = tc.METHODS["grpo"]
mine = grpo.replace(name="mine", chain=tc.Chain(*grpo.chain.parts, tc.TopFraction("entropy", 0.2)))
lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")


def correct(completions, answer, **_):
    return [float(task.verify(text, {"answer": gold}).correct) for text, gold in zip(completions, answer)]


config = GRPOConfig(max_steps=args.steps, max_completion_length=task.max_new_tokens, bf16=torch.cuda.is_available())
options = {"train_dataset": data, "peft_config": lora, "method": mine, "callbacks": [recorder]}
tc.CreditTrainer(resolve_model(args.model), correct, config, **options).train()
