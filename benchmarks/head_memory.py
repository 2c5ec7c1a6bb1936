"""Peak memory and time of the chunked LM-head statistics against materialised logits: V = 151,936, N = 8,192, float32,
CPU.

Each side runs in its own process: log-prob, entropy and Σ p² of every token, without gradients. memory_ratio is the
peak above what was there before the call (inputs and weights) over the size of the logits; time_ratio is chunked over
materialised, medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from _result import finish, resident

V, N = 151_936, 8_192


def materialised(hidden, weight, targets):
    logits = hidden @ weight.t()
    log_p = torch.log_softmax(logits, -1)
    del logits
    p = log_p.exp()
    return log_p.gather(1, targets[:, None])[:, 0], -torch.linalg.vecdot(p, log_p), torch.linalg.vecdot(p, p)


def chunked(hidden, weight, targets):
    from tokencredit.lm.head import Head, head_statistics

    return head_statistics(hidden, Head(weight), targets)


def forget_peak() -> int:
    """What is resident now, above which the next peak is."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def side(name: str, num: int, width: int, repeats: int) -> dict:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num, width, generator=generator), torch.randn(V, width, generator=generator) * 0.1
    targets = torch.randint(V, (num,), generator=generator)
    run = {"materialised": materialised, "chunked": chunked}[name]
    with torch.no_grad():
        run(hidden[:64], weight, targets[:64])
        before = forget_peak()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            found = run(hidden, weight, targets)
            seconds.append(time.perf_counter() - began)
    check = [x.double().mean().item() for x in found[:3]]
    return {"bytes": resident("VmHWM") - before, "seconds": statistics.median(seconds), "check": check}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["materialised", "chunked"])
    parser.add_argument("--tokens", type=int, default=N)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args.side, args.tokens, args.width, args.repeats)))
        return
    found = {}
    for name in ("chunked", "materialised"):
        command = [
            sys.executable,
            __file__,
            "--side",
            name,
            "--tokens",
            str(args.tokens),
            "--width",
            str(args.width),
            "--repeats",
            str(args.repeats),
        ]
        found[name] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        print(name, found[name])
    logits = args.tokens * V * 4
    gap = max(abs(a - b) for a, b in zip(found["chunked"]["check"], found["materialised"]["check"]))

    finish(
        "head_memory",
        {
            "memory_ratio": found["chunked"]["bytes"] / logits,
            "time_ratio": found["chunked"]["seconds"] / found["materialised"]["seconds"],
            "materialised_memory_ratio": found["materialised"]["bytes"] / logits,
            "largest_gap_of_means": gap,
            "N": args.tokens,
            "V": V,
            "D": args.width,
        },
    )


if __name__ == "__main__":
    main()
