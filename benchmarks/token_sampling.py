"""What `token_sampling` adds to the gradient's variance by the score it draws with: 20 % of the tokens of GRPO's
batches of reckon.

    Var = Σ c² ‖g‖² (1/q − 1)        exact: tokens are kept independently; ‖g‖ from a backward pass per token

as a share of the variance where every token is kept with probability 0.2. Means over batches of other prompts, with
Student's intervals.
"""

import argparse
from dataclasses import asdict

import torch

from _result import finish
from tokencredit import METHODS, Rollouts
from tokencredit.credit import TokenSampling
from tokencredit.lm import importance
from tokencredit.lm.completions import sample
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.prompts import encode_prompt
from tokencredit.lm.scoring import pad
from tokencredit.stats import mean_of_units
from tokencredit.tasks import load

GROUP = 8
KINDS = ("entropy", "surprisal", "head_norm", "gradient_norm", "fisher_trace")
DRAWS = {
    "|c|": TokenSampling(),
    "|c| entropy": TokenSampling("entropy"),
    "|c| sqrt entropy": TokenSampling("entropy", power=0.5),
    "|c| sqrt fisher_trace": TokenSampling("fisher_trace", power=0.5),
    "|c| surprisal": TokenSampling("surprisal"),
    "|c| head_norm": TokenSampling("head_norm"),
    "|c| gradient_norm, 8 directions": TokenSampling("gradient_norm"),
    "|c| gradient_norm, exact": TokenSampling("exact"),
}


def rollouts_of(model, tokenizer, task, num: int, seed: int) -> Rollouts:
    rows = task.rows("train", num, seed)
    prompts = [encode_prompt(tokenizer, row["prompt"], chat=None) for row in rows]
    drawn = [
        c
        for some in sample(model, tokenizer, prompts, GROUP, max_new_tokens=task.max_new_tokens, seed=seed)
        for c in some
    ]
    owner = [k for k in range(num) for _ in range(GROUP)]
    texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in drawn]
    reward = [float(task.verify(text, rows[k], c.truncated).correct) for text, k, c in zip(texts, owner, drawn)]
    batch = pad([prompts[k] for k in owner], [c.ids for c in drawn])
    masks = (batch.ids, batch.attention, batch.scatter(torch.ones(len(batch))))
    found = importance(model, *masks, kinds=KINDS, num_directions=8, method="finite_difference", seed=seed)
    exact = importance(model, *masks, kinds=("gradient_norm",), method="exact")["gradient_norm"]
    scores = {kind: found[kind].value.double() for kind in KINDS} | {"exact": exact.value.double()}
    return Rollouts(torch.tensor(reward, dtype=torch.float64), torch.tensor(owner), masks[2].bool(), scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, task = resolve_model("reckon"), load("reckon")
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    shares = {name: [] for name in DRAWS}
    for seed in range(options.batches):
        rollouts = rollouts_of(model, tokenizer, task, options.prompts, seed)
        credit = METHODS["grpo"].credit(rollouts)
        square = (credit * rollouts.score("exact")).square()
        for name, sampling in DRAWS.items():
            q = sampling.probability(credit, rollouts)
            kept = q > 0
            variance = (square[kept] * (1 / q[kept] - 1)).sum() / (square[kept] * (1 / sampling.fraction - 1)).sum()
            shares[name].append(float(variance))
    found = {name: mean_of_units(values) for name, values in shares.items()}
    for name, estimate in found.items():
        print(f"{name:34} {estimate}")
    settings = {"fraction": 0.2, "batches": options.batches, "prompts": options.prompts, "group": GROUP}
    finish("token_sampling", {"variance_share": {name: asdict(e) for name, e in found.items()}, **settings})


if __name__ == "__main__":
    main()
