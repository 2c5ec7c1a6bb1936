"""The log-linear statements on a network: at one context x, its logit gradients ∇_θ z_v(x) are the features.

    log p(v) = z_v − log Σ e^z   ⇒   ∇_θ log p(v) = ∇z_v − E_p ∇z        K_uv = ⟨∇z_u, ∇z_v⟩   (tangent kernel, [V, V])

so tr F = Σ p_v K_vv − pᵀK p ≤ (D(x)²/2) G with D(x)² = max (K_uu + K_vv − 2 K_uv): the sharp form of L1 holds for any
network, with a constant that belongs to the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokencredit.theory.entropy import collision, entropy, others
from tokencredit.theory.statement import Check, Statement

PROMPTS, SEED = 4, 0
FLOAT32 = 1e-4
"""Relative error of sums of squares of float32 gradients over 10⁵ parameters: about √(10⁵) · 2⁻²⁴ · a few layers."""


def check_network(constant: float = 0.5, prompts: int = PROMPTS) -> Check:
    """tr F ≤ constant · D(x)² G and ‖g‖ ≤ D(x) (1 − p) at every token that the shipped model samples; L1 and L2
    there.
    """
    from tokencredit.lm import exact
    from tokencredit.lm.directions import select_parameters
    from tokencredit.lm.readout import evaluating, find_readout, sequences

    model, ids, attention, completion = sampled(prompts)
    coverage, batch = select_parameters(model), sequences(ids, attention, completion)
    with evaluating(model):
        readout = find_readout(model, batch.ids[0])
        kernel, log_p = tangent_kernels(readout, coverage, batch)
        trace, norm = (
            exact.fisher_traces(readout, coverage, batch),
            exact.gradient_norms2(readout, coverage, batch).sqrt(),
        )
    p = log_p.exp()
    own = kernel.diagonal(dim1=1, dim2=2)
    diameter = (own[:, :, None] + own[:, None, :] - 2 * kernel).amax((1, 2)).sqrt()
    by_kernel = (p * own).sum(1) - torch.einsum("nu,nuv,nv->n", p, kernel, p)
    g, h = torch.stack([collision(row) for row in p]), entropy(p)
    rest = torch.stack([others(row) for row in p]).gather(1, batch.target[:, None])[:, 0]
    used, pointwise, l2 = trace / (constant * diameter**2 * g), norm / h.sqrt(), trace / (p.shape[1] * h)
    return Check(
        {
            "tokens": len(batch),
            "smallest tr F / (constant D^2 G)": used.min(),
            "largest tr F / (constant D^2 G)": used.max(),
            "smallest D(x)": diameter.min(),
            "largest D(x)": diameter.max(),
            "smallest |g|/sqrt(H)": pointwise.min(),
            "largest |g|/sqrt(H)": pointwise.max(),
            "smallest sqrt(tr F / H)": (trace / h).sqrt().min(),
            "largest sqrt(tr F / H)": (trace / h).sqrt().max(),
            "smallest tr F / (|V| H)": l2.min(),
            "largest tr F / (|V| H)": l2.max(),
            "share of tokens that break L2": (l2 > 1).double().mean(),
            "largest |g| / (D (1 - p))": (norm / (diameter * rest)).max(),
        },
        {
            "tr F two ways": bool(((by_kernel - trace).abs() <= FLOAT32 * trace).all()),
            "tr F <= constant D^2 G": bool((used <= 1 + FLOAT32).all()),
            "|g| <= D (1 - p)": bool((norm <= diameter * rest * (1 + FLOAT32)).all()),
            "L2 is broken": bool((l2 > 1).any()),
        },
    )


def sampled(prompts: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The shipped model and one sampled completion of each of the first held-out prompts: model, ids, attention mask,
    completion mask.
    """
    from tokencredit.lm.completions import sample
    from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
    from tokencredit.lm.prompts import encode_prompts
    from tokencredit.tasks.reckon import MAX_NEW_TOKENS, Reckon

    path = resolve_model("reckon")
    tokenizer, model = load_tokenizer(path), load_model(path)
    asked = encode_prompts(tokenizer, Reckon().rows("test", prompts, SEED), model.config, MAX_NEW_TOKENS, chat=False)
    written = [each[0].ids for each in sample(model, tokenizer, asked, 1, max_new_tokens=MAX_NEW_TOKENS, seed=SEED)]
    width = max(len(a) + len(b) for a, b in zip(asked, written))
    ids, attention, completion = (
        torch.zeros(len(asked), width, dtype=torch.long, device=model.device) for _ in range(3)
    )
    for row, (prompt, rest) in enumerate(zip(asked, written)):
        length = len(prompt) + len(rest)
        ids[row, :length] = torch.tensor([*prompt, *rest])
        attention[row, :length], completion[row, len(prompt) : length] = 1, 1
    return model, ids, attention, completion


def tangent_kernels(readout: Any, coverage: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """K [N, V, V] and log p [N, V] of every scored token, one backward pass per token and vocabulary entry."""
    from tokencredit.lm.exact import differentiating

    kernel, log_p = None, None
    with differentiating(coverage) as parameters:
        for part, keep in batch.chunks(1):
            z = readout.head.logits(readout.hidden(part.ids, part.attention)[part.row, part.position].double())
            if kernel is None:
                kernel, log_p = z.new_zeros(len(batch), z.shape[1], z.shape[1]), z.new_zeros(len(batch), z.shape[1])
            basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            for i, at in enumerate(keep.tolist()):
                found = torch.autograd.grad(
                    z[i], parameters, basis, is_grads_batched=True, retain_graph=True, allow_unused=True
                )
                jacobian = torch.cat([each.flatten(1) for each in found if each is not None], 1).double()
                kernel[at], log_p[at] = jacobian @ jacobian.t(), torch.log_softmax(z[i].detach(), -1)
    return kernel, log_p


STATEMENTS = (
    Statement(
        "network",
        "L1 and L2 for a network in place of a log-linear policy",
        "true in root mean square with D of the context, L2 false",
        "the proposal, lemmas 1 and 2, on the shipped model",
        "tr F ≤ (D(x)²/2) G and ‖g(v)‖ ≤ D(x) (1 − p(v)), where D(x) is the diameter of the logit gradients at that"
        " context",
        check_network,
    ),
)
