"""Importance proxies: cheap guesses of how much a token matters, for every completion token of a batch, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm import exact
from tokencredit.lm.attention import attention_received
from tokencredit.lm.directions import LORA, Coverage, select_parameters
from tokencredit.lm.last_block import last_block_norms2
from tokencredit.lm.models import CausalModel
from tokencredit.lm.noise import SCALES, sampled_variance, scale_of
from tokencredit.lm.readout import Readout, Sequences, check_finite, evaluating, find_readout, sequences, unwrap
from tokencredit.lm.room import Room
from tokencredit.lm.scoring import kl_divergence, token_scores
from tokencredit.lm.sketch import DifferenceStep, Sketch, sketch
from tokencredit.lm.tangents import head_norms

FORWARD = ("entropy", "surprisal", "varentropy", "margin", "sum_p2", "head_norm", "head_fisher", "kl_to_ref")
HEAD = ("head_norm", "head_fisher")
SKETCHED = ("gradient_norm", "fisher_trace", "perturbation_variance")
KINDS = (*FORWARD, "last_block_norm", *SKETCHED, "attention")
WAYS = ("auto", "exact", "sketch", "jvp", "finite_difference")
PERTURBATIONS = ("first_order", *SCALES)
SHORT, SHORT_LORA, SMALL_LORA = 64, 256, 1_000_000
"""`auto` is never exact for rows with as many scored tokens as SHORT, or as SHORT_LORA where at most SMALL_LORA adapter
weights count.
"""
MOMENT = 1e10
"""Multiplications that exact gradients of a row may take where a sketch takes fewer: well below a second."""
DIRECTIONS, TOKENS = 8, 8192


@dataclass(frozen=True, eq=False)
class Proxy:
    """One kind of importance: value and standard_error [B, L], zero off the completion; `method` says how it was
    computed.

    The standard error is that of the sampled directions (or perturbations), 0 where the value is exact.
    """

    value: Tensor
    standard_error: Tensor
    method: str


@dataclass(frozen=True, eq=False)
class Importance(Mapping):
    """The proxies by kind, and what they refer to.

    covered     names of the parameters whose gradients count      uncovered
                                                                        those selected that could not be moved, and why
    step        of the finite difference, with its measured error  num_directions, seed, selection   as asked for
    """

    proxies: dict[str, Proxy]
    covered: tuple[str, ...]
    uncovered: dict[str, str]
    num_parameters: int
    selection: str | tuple[str, ...]
    num_directions: int
    seed: int
    step: DifferenceStep | None = None

    def __getitem__(self, kind: str) -> Proxy:
        if kind not in self.proxies:
            raise KeyError(f'"{kind}" was not asked for; there are: {", ".join(self.proxies)}')
        return self.proxies[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.proxies)

    def __len__(self) -> int:
        return len(self.proxies)


def importance(
    model: CausalModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    kinds: Sequence[str] = ("gradient_norm", "fisher_trace"),
    num_directions: int | None = None,
    method: str = "auto",
    parameters: str | Sequence[str] = "all",
    seed: int = 0,
    *,
    temperature: float = 1.0,
    ref_model: Any = None,
    perturbation: str = "first_order",
    scale: float | None = None,
    uncovered: str = "refuse",
    max_tokens: int | None = None,
    memory: int | None = None,
    rows: slice | None = None,
) -> Importance:
    """Proxies of the importance of every completion token t of a causal LM; input_ids and masks are [B, L], padded on
    any side.

    entropy, varentropy, margin, sum_p2   of p: nats, nats², largest less second probability, Σ p²
                                                                                                 surprisal    −log p(t)
    head_norm         ‖e_t − p‖ ‖h‖ (with a bias ‖e_t − p‖ √(‖h‖² + 1)), the gradient norm over the LM head, exact
    head_fisher       (1 − Σ p²) ‖h‖² (with a bias ‖h‖² + 1): the sum of the Fisher information's diagonal over the LM
                      head, E_{v~p} of head_norm², exact. Its root is the cheapest stand-in for a gradient norm that the
                      token itself has no part in
    kl_to_ref         KL(p ‖ p_ref), needs `ref_model`
    last_block_norm   gradient norm over the position-local part of the last block and the head, exact, one backward
                      pass
    gradient_norm     ‖∇ log p(t)‖                        fisher_trace    tr F = E_{v~p} ‖∇ log p(v)‖²
    perturbation_variance   p(t)² ‖∇ log p(t)‖², the variance of p(t) per unit of parameter variance, to first order;
                            or, with
                      `perturbation` "gaussian" (σ = scale, default 1e-3) or "dropout" (rate = scale, default 0.1), the
                      variance over `num_directions` perturbed models
    attention         received from later tokens, summed over heads, per later query, mean over layers

    method         "exact": one backward pass per token (for fisher_trace, per token and vocabulary entry); "jvp" and
                   "finite_difference": `num_directions` random directions for all tokens at once, by forward mode or by
                   moved weights; "sketch": finite differences in full precision and forward mode in half precision, the
                   other one where that fails; "auto": exact where that is cheaper or takes a moment (`exact_is_cheap`)
                   and no number of directions is given, else "sketch". fisher_trace is exact only on request. Which it
                   was is `method` of a proxy
    num_directions 8 by default
    parameters     "all", "trainable" (that require a gradient), "lora", or name patterns; parameters that cannot be
                   moved are refused by name, or listed with uncovered="report"
    temperature    of the policy that sampled
    max_tokens     padded tokens of one pass, at most: 8,192 by default, and no more than `memory` bytes of the process
                   allow (`lm.room`)
    rows           of the batch to measure, all by default; the others are 0. The way, the step of a finite difference
                   and the passes are those of the whole batch: processes that share its rows find what one would

    ValueError names what is wrong: shapes, a first token without a prefix, a row beyond the context, logits that are
    not finite.
    """
    chosen = "sketch" if method == "auto" and num_directions is not None else method
    num_directions = DIRECTIONS if num_directions is None else num_directions
    _check(kinds, num_directions, method, uncovered, ref_model)
    check_perturbation(perturbation, scale)
    inner = unwrap(model)
    device = next(inner.parameters()).device
    limit = getattr(inner.config, "max_position_embeddings", None)
    whole = sequences(*(x.to(device) for x in (input_ids, attention_mask, completion_mask)), limit)
    batch = whole if rows is None else whole.part(range(len(whole.ids))[rows])
    coverage = select_parameters(inner, parameters, uncovered)
    room, most = Room.of(inner, memory), max_tokens or TOKENS
    forward, backward = min(most, room.tokens()), min(most, room.tokens_back())
    width = whole.ids.shape[1]
    about = {
        "covered": tuple(coverage.named),
        "uncovered": coverage.uncovered,
        "num_parameters": coverage.num_parameters,
        "selection": coverage.selection,
        "num_directions": num_directions,
        "seed": seed,
    }
    if not len(batch):
        none = torch.zeros(batch.shape, device=device)
        return Importance({kind: Proxy(none, none, "exact") for kind in kinds}, **about)
    with evaluating(inner):
        readout = find_readout(inner, batch.ids[int(batch.attention.sum(1).argmax())], temperature)
        found = _free(readout, coverage, batch, kinds, ref_model, forward)
        if "last_block_norm" in kinds:
            found["last_block_norm"] = _exactly(last_block_norms2(readout, coverage, batch, backward).sqrt())
        if "attention" in kinds:
            found["attention"] = _exactly(attention_received(readout, batch, min(most, room.tokens_attending(width))))
        asked = [kind for kind in SKETCHED if kind in kinds]
        if "perturbation_variance" in asked and perturbation != "first_order":
            asked.remove("perturbation_variance")
            values = sampled_variance(
                readout,
                coverage,
                batch,
                num=num_directions,
                seed=seed,
                kind=perturbation,
                scale=scale_of(perturbation, scale),
                tokens=forward,
            )
            found["perturbation_variance"] = (*values, perturbation)
        if chosen == "auto":
            longest, size = int(torch.bincount(whole.row).max()), sum(p.numel() for p in inner.parameters())
            chosen = "exact or sketch" if exact_is_cheap(size, coverage, longest, width) else "sketch"
        tokens = {"finite_difference": backward, "jvp": min(backward, room.tokens_along(width, num_directions))}
        options = {"num_directions": num_directions, "seed": seed, "whole": whole}
        step = _gradients(found, asked, readout, coverage, batch, chosen, tokens, options)
    proxies = {
        kind: Proxy(batch.scatter(v.float()), batch.scatter(e.float()), how) for kind, (v, e, how) in found.items()
    }
    return Importance({kind: proxies[kind] for kind in kinds}, **about, step=step)


def check_perturbation(kind: str, scale: float | None) -> None:
    """ValueError for a perturbation that there is not, and for a scale that is none."""
    if kind not in PERTURBATIONS:
        raise ValueError(f"no perturbation is called {kind!r}; there are: {', '.join(PERTURBATIONS)}")
    if kind in SCALES:
        scale_of(kind, scale)
    elif scale is not None:
        raise ValueError(f"perturbation {kind!r} samples nothing: it takes no scale; {', '.join(SCALES)} do")


def check_kinds(kinds: Sequence[str], ref_model: Any = None) -> None:
    """ValueError for a kind that `importance` does not know, or that needs the reference model."""
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        _known("kind", kind, KINDS)
    if isinstance(kinds, str):
        raise ValueError(f'kinds is a sequence of names: kinds=("{kinds}",)')
    if "kl_to_ref" in kinds and ref_model is None:
        raise ValueError("kl_to_ref needs ref_model=...")


def _check(kinds: Sequence[str], num_directions: int, method: str, uncovered: str, ref_model: Any) -> None:
    check_kinds(kinds, ref_model)
    _known("method", method, WAYS)
    _known("uncovered", uncovered, ("refuse", "report"))
    if num_directions < 2:
        raise ValueError(f"num_directions must be at least 2, for a standard error; got {num_directions}")


def _known(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"no {what} is called {value!r}; there are: {', '.join(known)}")


def _exactly(value: Tensor) -> tuple[Tensor, Tensor, str]:
    return value, torch.zeros_like(value), "exact"


@torch.no_grad()
def _free(
    readout: Readout, coverage: Coverage, batch: Sequences, kinds: Sequence[str], ref_model: Any, tokens: int
) -> dict[str, tuple]:
    """{kind: (value [N], standard error [N], method)} for the kinds that one forward pass gives."""
    free = [kind for kind in FORWARD if kind in kinds]
    if "perturbation_variance" in kinds and "surprisal" not in free:
        free.append("surprisal")
    of_head = [kind for kind in HEAD if kind in free]
    if of_head and readout.whole:
        raise ValueError(f"{type(readout.model).__name__} has no {of_head[0]}: {readout.why}")
    names = [{"surprisal": "logprob"}.get(kind, kind) for kind in free if kind not in (*HEAD, "kl_to_ref")]
    ref = find_readout(ref_model, batch.ids[0], readout.head.temperature) if "kl_to_ref" in free else None
    found = {kind: torch.zeros(len(batch), device=batch.ids.device) for kind in free}
    for part, keep in batch.chunks(tokens) if free else ():
        hidden = readout.hidden(part.ids, part.attention)[part.row, part.position]
        check_finite(hidden, "hidden states")
        values = token_scores(hidden, readout.head, part.target, names) if names else {}
        if "logprob" in values:
            values["surprisal"] = -values.pop("logprob")
        if of_head:
            norm2, trace = head_norms(hidden, readout.head, part.target)
            values |= {kind: {"head_norm": norm2.sqrt(), "head_fisher": trace}[kind] for kind in of_head}
        if ref is not None:
            with evaluating(ref_model):
                ref_hidden = ref.hidden(part.ids, part.attention)[part.row, part.position]
            values["kl_to_ref"] = kl_divergence(hidden, readout.head, ref_hidden, ref.head)
        for kind, value in values.items():
            found[kind][keep] = value.float()
    return {kind: _exactly(value) for kind, value in found.items()}


def _gradients(
    found: dict,
    asked: list[str],
    readout: Readout,
    coverage: Coverage,
    batch: Sequences,
    method: str,
    tokens: Mapping[str, int],
    options: Mapping[str, Any],
) -> DifferenceStep | None:
    """Adds the kinds that need gradients over parameters; the step, where finite differences were taken. "exact or
    sketch" is exact for all but Fisher traces.
    """
    norms = [kind for kind in asked if kind != "fisher_trace"]
    if norms and method in ("exact", "exact or sketch"):
        _add(found, norms, exact.gradient_norms2(readout, coverage, batch), None, "exact")
    if "fisher_trace" in asked and method == "exact":
        _add(found, ["fisher_trace"], exact.fisher_traces(readout, coverage, batch), None, "exact")
    left = [kind for kind in asked if kind not in found]
    if not left:
        return None
    wanted = {"norms": left != ["fisher_trace"], "traces": "fisher_trace" in left}
    drawn = _sketch(readout, coverage, batch, method, tokens, {**options, **wanted})
    for kind in left:
        samples = (drawn.fisher() if kind == "fisher_trace" else drawn.norm2()).double()
        _add(found, [kind], samples.mean(0).clamp(min=0), samples.std(0) / len(samples) ** 0.5, drawn.method)
    return drawn.step


def _add(found: dict, kinds: list[str], square: Tensor, error: Tensor | None, method: str) -> None:
    """The kinds that follow from a squared norm (or a trace) and its standard error, by the delta method."""
    error = torch.zeros_like(square) if error is None else error
    for kind in kinds:
        if kind == "gradient_norm":
            norm = square.sqrt()
            found[kind] = norm, torch.where(norm > 0, error / (2 * norm), error.sqrt()), method
        elif kind == "perturbation_variance":
            p2 = (-2 * found["surprisal"][0].double()).exp()
            found[kind] = p2 * square, p2 * error, method
        else:
            found[kind] = square, error, method


def exact_is_cheap(size: int, coverage: Coverage, longest: int, width: int, directions: int = DIRECTIONS) -> bool:
    """Whether a backward pass per token costs less than a sketch of the row, or a moment. Multiplications for a row of
    `width` tokens, n = `longest` of them scored, of a model of P = `size` parameters, C of them covered:

        exact  n (P + C) · width          sketch  (K + 6) P · width

    K directions are a forward pass each; the rest of a sketch takes about as much as six. Rows of many scored tokens
    are always sketched.
    """
    small = coverage.num_parameters <= SMALL_LORA and all(LORA in name for name in coverage.named)
    if longest >= (SHORT_LORA if small else SHORT):
        return False
    exact = longest * (size + coverage.num_parameters) * width
    return exact <= max((directions + 6) * size * width, MOMENT)


def _sketch(
    readout: Readout,
    coverage: Coverage,
    batch: Sequences,
    method: str,
    tokens: Mapping[str, int],
    options: dict[str, Any],
) -> Sketch:
    full = next(readout.model.parameters()).dtype in (torch.float32, torch.float64)
    either = ["finite_difference", "jvp"] if full else ["jvp", "finite_difference"]
    ways = either if method in ("sketch", "exact or sketch") else [method]
    for way in ways:
        try:
            return sketch(readout, coverage, batch, method=way, tokens=tokens[way], **options)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if way != ways[-1] and "not finite" not in str(error):
                continue
            if way == "jvp" and not isinstance(error, ValueError):
                kind, first = type(readout.model).__name__, str(error).splitlines()[0]
                raise ValueError(
                    f"{kind} has no forward-mode derivative ({first}): use method='finite_difference' or 'exact'"
                ) from error
            raise
    raise AssertionError("unreachable")
