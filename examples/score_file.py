"""Which tokens of the completions in a file stand out? `tokencredit score --data` writes the same as a table.

python examples/score_file.py rows.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --chat    # rows {"prompt", "completion"}
"""

import argparse
import json
from pathlib import Path

from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.prompts import encode_completion
from tokencredit.scores.measure import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--model", default="reckon")
parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="ask as a user, or continue plain text")
parser.add_argument("--scores", nargs="+", default=["entropy", "gradient_norm"])
args = parser.parse_args()

policy = PolicyConfig(args.model, task="given", chat=args.chat).open()
rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
prompts = [policy.encode(row["prompt"]) for row in rows]
completions = [encode_completion(policy.tokenizer, row["completion"]) for row in rows]
scores = measure(policy, rows, prompts, completions, args.scores)

print("token", *args.scores, sep="\t")
for i, ids in enumerate(completions):
    for position, token in enumerate(policy.tokens(ids)):
        print(repr(token), *(f"{scores[name][i][position]:.4g}" for name in args.scores), sep="\t")
