"""Which tokens decided the outcome? Replace each, let the policy finish, verify: credit with intervals.

python examples/pivotality_own_model.py --model Qwen/Qwen2.5-0.5B-Instruct --task stories --chat --prompts 4
"""

import argparse

import numpy as np

from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.budgets import Fixed
from tokencredit.pivotality.measure import measure
from tokencredit.pivotality.store import RolloutStore

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="reckon")
parser.add_argument("--task", default="reckon")
parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="ask as a user, or continue plain text")
parser.add_argument("--prompts", type=int, default=2)
parser.add_argument("--rollouts", type=int, default=16)
args = parser.parse_args()

policy = PolicyConfig(args.model, args.task, chat=args.chat).open()
rows = policy.task.rows("test", limit=args.prompts)
prompts = policy.encode_rows(rows)
traces = [Trace(tuple(ids), drawn.ids) for ids, [drawn] in zip(prompts, policy.complete(prompts, 1, seed=0))]
found = measure(
    traces,
    policy.sampler(),
    lambda k, ids, truncated: policy.verdict(ids, rows[k], truncated),
    budget=Fixed(args.rollouts),
    max_new_tokens=policy.max_new_tokens,
    store=RolloutStore(None, {}),  # in memory; a directory makes it resumable
)
for trace, measured in zip(traces, found):
    tokens, effect = policy.tokens(trace.completion), measured.estimate.before_after
    for i in sorted(np.argsort(-np.abs(np.nan_to_num(effect.value)))[:3]):
        print(f"token {i} {tokens[i]!r}: {effect.value[i]:+.2f} [{effect.low[i]:+.2f}, {effect.high[i]:+.2f}]")
