"""Seconds of `importance` (K = 8, 1M parameters) against one backward pass per token, on the same rows.

T480, T1024: how many times faster the sketch is (median of repeats). The backward passes are timed on a sample of
tokens spread over the row and scaled to all of them. flat_in_tokens: seconds for all T = 480 tokens over seconds for 16
of them, in the same rows. auto_below_64: seconds of method="auto" over those of "exact" at T = 48.
"""

import statistics
import time

import torch

from _importance_models import make_model, text_ids, train, windows
from _result import finish
from tokencredit.lm import importance


def seconds(run, repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def backward_per_token(model, ids: torch.Tensor, sample: int) -> float:
    """Seconds for all T tokens of one row: one forward pass, and a backward pass for each token of a sample, scaled."""
    parameters = list(model.parameters())
    began = time.perf_counter()
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
    forward = time.perf_counter() - began
    tokens = torch.linspace(0, len(log_p) - 1, sample).long().tolist()
    began = time.perf_counter()
    for t in tokens:
        grads = torch.autograd.grad(log_p[t], parameters, retain_graph=True, allow_unused=True)
        sum(g.square().sum() for g in grads if g is not None).sqrt().item()
    return forward + (time.perf_counter() - began) * len(log_p) / sample


def completion(ids: torch.Tensor, last: int) -> torch.Tensor:
    mask = torch.zeros_like(ids)
    mask[:, -last:] = 1
    return mask


def main() -> None:
    torch.set_num_threads(1)
    text, model = text_ids(), make_model("1M")
    train(model, text, 20)
    generator = torch.Generator().manual_seed(1)
    figures = {"num_directions": 8, "num_parameters": sum(p.numel() for p in model.parameters())}

    def sketch(ids, last, **options):
        return importance(model, ids, torch.ones_like(ids), completion(ids, last), num_directions=8, **options)

    for length in (480, 1024):
        ids = windows(text, 1, length + 1, generator)
        sketch(ids, length)
        ours = seconds(lambda: sketch(ids, length))  # noqa: B023
        naive = statistics.median(backward_per_token(model, ids, 24) for _ in range(3))
        figures |= {f"T{length}": naive / ours, f"seconds_{length}": ours, f"backward_seconds_{length}": naive}
    ids = windows(text, 1, 481, generator)
    all_of_them, few = (seconds(lambda: sketch(ids, num, method="finite_difference"), 5) for num in (480, 16))  # noqa: B023
    figures["flat_in_tokens"] = all_of_them / few
    ids = windows(text, 2, 49, generator)
    both = [seconds(lambda: sketch(ids, 48, kinds=("gradient_norm",), method=m), 5) for m in ("auto", "exact")]  # noqa: B023
    figures["auto_below_64"] = both[0] / both[1]
    figures["backward_tokens_timed"] = 24
    finish("importance_speed", figures)


if __name__ == "__main__":
    main()
