"""What a policy of the embedded world is made of: how often each role occurs, how uncertain it is, how much it decides.

    credit of a token    Q − V, exact up to the brackets of the prefix tree
    decisive position    max over valid @k of |Q(x, @k) − V(x)| > 0.3     whatever was chosen there

A *confident pivot* is a decisive `fork` or `habit` position whose entropy is under 0.3 nats: entropy says it is
settled, and a token the policy could have chosen would change the outcome. A world without any makes entropy look like
a better guide than it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch

from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.pivotality.tree import PrefixTree, grow_forest, on_text
from tokencredit.tasks.reckon import MAX_NEW_TOKENS, STEPS, Expression, Reckon, expression_after, is_valid

LOW_ENTROPY = 0.3
DECISIVE = 0.3


@torch.no_grad()
def draw(model: CausalModel, tokenizer: Tokenizer, row: dict, samples: int) -> list[list[int]]:
    """Completions of one prompt at temperature 1, as ids up to and with `<eos>`, at most `MAX_NEW_TOKENS`."""
    inputs = tokenizer([row["prompt"]] * samples, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, do_sample=True, max_new_tokens=MAX_NEW_TOKENS)[
        :, inputs["input_ids"].shape[1] :
    ].tolist()
    eos = tokenizer.eos_token_id
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in out]


def decisive(tree: PrefixTree, prefix: list[int], expression: Expression, steps: list[int]) -> bool:
    """Would some valid `@k` move the success probability by more than 0.3 from V(prefix)? `steps` are the ids of @1 to
    @4.

    The nearest ends of the brackets are compared, so a pruned tree finds too few such positions, never too many.
    """
    low, high = tree.value(prefix)
    found = tree.alternatives(prefix)
    valid = {steps[k - 1] for k in range(1, len(expression) // 2 + 1) if is_valid(expression, k)}
    for token, (worst, best) in zip(found.token.tolist(), found.value.tolist()):
        if token in valid and max(worst - high, low - best) > DECISIVE:
            return True
    return False


def anatomy(
    model: CausalModel,
    tokenizer: Tokenizer,
    task: Reckon,
    *,
    prompts: int = 64,
    samples: int = 4,
    seed: int = 0,
    eps: float = 1e-4,
) -> dict:
    """Of sampled completions of held-out prompts: `tokens`, `confident_pivots` (share of tokens), `prompts_with_one`,
    and per role its `share`, mean `entropy` (nats) and mean absolute `credit`. Draws from torch's generator; trees are
    pruned at `eps`."""
    rows = task.rows("test", prompts, seed)
    drawn = [draw(model, tokenizer, row, samples) for row in rows]
    trees = grow_forest(
        model,
        [tokenizer(row["prompt"])["input_ids"] for row in rows],
        [on_text(task.verify, tokenizer, row) for row in rows],
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        eps=eps,
        include=drawn,
    )
    steps = tokenizer.convert_tokens_to_ids(list(STEPS))
    sums, found, having = defaultdict(Counter), 0, set()
    for row, tree, completions in zip(rows, trees, drawn):
        for ids in completions:
            words, path = tokenizer.convert_ids_to_tokens(ids), tree.path(ids)
            for i, (slot, role) in enumerate(zip(task.slots(row, words), task.roles(row, words))):
                entropy = float(path.entropy[i])
                sums[role].update(count=1, entropy=entropy, credit=abs(float(path.credit[i])))
                confident = slot in ("fork", "habit") and entropy < LOW_ENTROPY
                if confident and decisive(tree, ids[:i], expression_after(row, words[:i]), steps):
                    found += 1
                    having.add(row["row_id"])
    total = sum(counts["count"] for counts in sums.values())
    roles = {}
    for role, counts in sorted(sums.items(), key=lambda item: -item[1]["count"]):
        num = counts["count"]
        roles[role] = {"share": num / total, "entropy": counts["entropy"] / num, "credit": counts["credit"] / num}
    return {
        "tokens": total,
        "confident_pivots": found / total,
        "prompts_with_one": len(having) / len(rows),
        "roles": roles,
    }
