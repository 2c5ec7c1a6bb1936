"""Processor seconds of `importance` (K = 8, 1M parameters) against two loops of a backward pass per token, on the same
rows.

`whole row`: one forward pass of the row, and a backward pass through it for every token. `prefix`: a forward and a
backward pass of the prefix that ends with the token, which is all that its gradient depends on; the better of the two.
Both are timed on 24 tokens spread evenly over the row and scaled to all of them. T480, T1024: how many times faster the
sketch is than the prefix loop, [median, least, most] of repeats; T480_whole_row, T1024_whole_row the same against the
other. flat_in_tokens: seconds for all T = 480 tokens over seconds for 16 of them, in the same rows. auto_below_64:
seconds of method="auto" over those of "exact" at T = 48.
"""

import statistics
import time

import torch

from _importance_models import make_model, text_ids, train, windows
from _result import finish
from tokencredit.lm import importance

SAMPLE, REPEATS = 24, 5


def seconds(run, repeats: int = REPEATS) -> list[float]:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return found


def times(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster: of the medians, and of the least and the most that the repeats allow."""
    middle = statistics.median(slow) / statistics.median(fast)
    return {"value": middle, "low": min(slow) / max(fast), "high": max(slow) / min(fast)}


def logprobs(model, ids: torch.Tensor) -> torch.Tensor:
    """[T]: of the tokens after the first."""
    return torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]


def norm(model, value: torch.Tensor, keep: bool) -> float:
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=keep, allow_unused=True)
    return sum(g.square().sum() for g in grads if g is not None).sqrt().item()


def places(ids: torch.Tensor) -> list[int]:
    return torch.linspace(0, ids.shape[1] - 2, SAMPLE).long().tolist()


def whole_row(model, ids: torch.Tensor) -> float:
    """Seconds for all T tokens: one forward pass, and a backward pass for each token of a sample, scaled."""
    began = time.process_time()
    log_p = logprobs(model, ids)
    forward = time.process_time() - began
    began = time.process_time()
    for t in places(ids):
        norm(model, log_p[t], keep=True)
    return forward + (time.process_time() - began) * len(log_p) / SAMPLE


def prefix(model, ids: torch.Tensor) -> float:
    """Seconds for all T tokens: forward and backward of the prefix of each token of a sample, scaled."""
    began = time.process_time()
    for t in places(ids):
        norm(model, logprobs(model, ids[:, : t + 2])[-1], keep=False)
    return (time.process_time() - began) * (ids.shape[1] - 1) / SAMPLE


def completion(ids: torch.Tensor, last: int) -> torch.Tensor:
    mask = torch.zeros_like(ids)
    mask[:, -last:] = 1
    return mask


LOOPS = {"whole row": whole_row, "prefix": prefix}


def main() -> None:
    torch.set_num_threads(1)
    text, model = text_ids(), make_model("1M")
    train(model, text, 20)
    generator = torch.Generator().manual_seed(1)
    figures = {"num_directions": 8, "num_parameters": sum(p.numel() for p in model.parameters())}

    def sketch(ids, last, **options):
        options = {"num_directions": 8, **options}
        return importance(model, ids, torch.ones_like(ids), completion(ids, last), **options)

    for length in (480, 1024):
        ids = windows(text, 1, length + 1, generator)
        sketch(ids, length)
        ours = seconds(lambda: sketch(ids, length))  # noqa: B023
        loops = {name: [loop(model, ids) for _ in range(REPEATS)] for name, loop in LOOPS.items()}
        figures |= {f"T{length}": times(loops["prefix"], ours), f"seconds_{length}": statistics.median(ours)}
        figures |= {f"T{length}_whole_row": times(loops["whole row"], ours)}
        figures |= {f"{name}_seconds_{length}": statistics.median(each) for name, each in loops.items()}
    ids = windows(text, 1, 481, generator)
    everything, few = (seconds(lambda: sketch(ids, num, method="finite_difference")) for num in (480, 16))  # noqa: B023
    figures["flat_in_tokens"] = times(everything, few)
    ids = windows(text, 2, 49, generator)
    options = {"kinds": ("gradient_norm",), "num_directions": None}
    auto, exact = (seconds(lambda: sketch(ids, 48, method=m, **options)) for m in ("auto", "exact"))  # noqa: B023
    figures["auto_below_64"] = times(auto, exact)
    figures["tokens_timed"] = SAMPLE
    finish("importance_speed", figures)


if __name__ == "__main__":
    main()
