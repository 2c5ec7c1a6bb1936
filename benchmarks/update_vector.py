"""Is the update vector the step that AdamW makes? From a checkpoint of a run, over batches, in float32 and float64; and
what it costs.

The real step is torch's own: the checkpoint's optimizer.pt loaded into AdamW, the loss through the model's logits,
clipping by torch.
"""

import time

import torch

from _checkpoint import STEP, trained_run
from _result import finish
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.update import update_vector
from tokencredit.dynamics.vectors import cosine, moved, norm, trained
from tokencredit.methods import METHODS

BATCHES = 4
METHOD_NAMES = ("grpo", "gtpo")


def real_step(checkpoint, batch, method):
    """{name: change} of one step of torch's AdamW; the model is left as it was."""
    model, named = checkpoint.model, trained(checkpoint.model)
    saved = torch.load(checkpoint.path / "optimizer.pt", weights_only=True)
    norms = [p for n, p in named.items() if "norm" in n]
    optimizer = torch.optim.AdamW([{"params": [p for n, p in named.items() if "norm" not in n]}, {"params": norms}])
    optimizer.load_state_dict(saved)
    with moved(named, {name: torch.zeros_like(p) for name, p in named.items()}):
        before = {name: p.detach().double().clone() for name, p in named.items()}
        mask = batch.rollouts.mask
        logprob = torch.zeros(mask.shape, dtype=torch.float64)
        rows = [torch.tensor([*p, *c]) for p, c in zip(batch.prompts, batch.completions)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        log_p = model(
            input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows])).long()
        )
        log_p = log_p.logits.double().log_softmax(-1)
        for i, (p, c) in enumerate(zip(batch.prompts, batch.completions)):
            at = torch.arange(len(c))
            logprob[i, : len(c)] = log_p[i, len(p) - 1 + at, torch.tensor(c)]
        loss, _ = method.loss(
            logprob=logprob, old_logprob=logprob.detach(), credit=method.credit(batch.rollouts), rollouts=batch.rollouts
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), checkpoint.max_grad_norm)
        optimizer.step()
        return {name: p.detach().double() - before[name] for name, p in named.items()}


def main():
    worst, seconds = {}, []
    with trained_run() as run:
        for dtype in (torch.float32, torch.float64):
            checkpoint = open_checkpoint(run, STEP, dtype=dtype)
            for seed in range(BATCHES):
                batch = draw(checkpoint, 64, 8, seed=seed)
                for name in METHOD_NAMES:
                    began = time.perf_counter()
                    update = update_vector(checkpoint, batch, METHODS[name])
                    seconds.append(time.perf_counter() - began)
                    real = real_step(checkpoint, batch, METHODS[name])
                    found = (1 - cosine(update.vector, real), abs(norm(update.vector) / norm(real) - 1))
                    worst[dtype] = tuple(map(max, zip(worst.get(dtype, (0, 0)), found)))
    finish(
        "update_vector",
        {
            "cosine": 1 - worst[torch.float32][0],
            "relative_norm": worst[torch.float32][1],
            "cosine_float64": 1 - worst[torch.float64][0],
            "relative_norm_float64": worst[torch.float64][1],
            "batches": BATCHES,
            "methods": METHOD_NAMES,
            "rollouts": 512,
            "seconds_per_vector": sum(seconds) / len(seconds),
        },
    )


if __name__ == "__main__":
    main()
