"""The verifier against its table of cases (`tests/data/answers.jsonl`) and math-verify alone against the same; and what
hostile answers cost: 4,096 completions without bombs, and with one bomb in a hundred, each another one.

An unmarked answer of the table stands in `\\boxed{}`, the form that both read; a marked one is the whole completion.
"""

import argparse
import json
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from _result import finish
from tokencredit.tasks import answers, bounded, shapes
from tokencredit.tasks.bounded import Limits

TABLE = Path(__file__).parent.parent / "tests" / "data" / "answers.jsonl"
MARKS = ("<answer>", "<ANSWER>", "\\boxed", "\\fbox", "####")
PEER_SECONDS = 30.0
BATCH, GROUP, BOMBS = 4096, 8, 41


def completion_of(answer: str) -> str:
    return answer if any(mark in answer for mark in MARKS) else f"\\boxed{{{answer}}}"


class Peer:
    """math-verify alone; a question that it does not survive, or not answer in half a minute, is not accepted."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lost = 0

    def accepts(self, gold: str, completion: str) -> bool:
        if self.process is None:
            script = str(Path(__file__).with_name("_peer_verifier.py"))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, "-P", script], text=True, bufsize=1, **pipes)
        self.process.stdin.write(json.dumps({"gold": gold, "completion": completion}) + "\n")
        ready, _, _ = select.select([self.process.stdout], [], [], PEER_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.lost += 1
            self.close()
            return False
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def faults(cases: list[dict], accepted: list[bool]) -> tuple[Counter, Counter]:
    """False accepts and false rejects by kind."""
    false_accepts = Counter(case["why"] for case, yes in zip(cases, accepted) if yes and not case["verdict"])
    false_rejects = Counter(case["why"] for case, yes in zip(cases, accepted) if case["verdict"] and not yes)
    return false_accepts, false_rejects


def compare() -> dict:
    """Both verifiers on the table."""
    cases = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    completions = [completion_of(case["answer"]) for case in cases]
    ours = [verdict.correct for verdict in answers.verify_many(completions, [case["gold"] for case in cases])]
    peer = Peer()
    theirs = [peer.accepts(case["gold"], completion) for case, completion in zip(cases, completions)]
    peer.close()
    accepts, rejects = faults(cases, ours)
    peer_accepts, peer_rejects = faults(cases, theirs)
    return {
        "cases": len(cases),
        "wrong_answers": sum(not case["verdict"] for case in cases),
        "right_answers": sum(case["verdict"] for case in cases),
        "false_accepts": accepts.total(),
        "false_rejects": rejects.total(),
        "peer_false_accepts": peer_accepts.total(),
        "peer_false_rejects": peer_rejects.total(),
        "peer_lost": peer.lost,
        "peer_false_accepts_by_kind": dict(peer_accepts.most_common()),
        "peer_false_rejects_by_kind": dict(peer_rejects.most_common()),
    }


def bomb(n: int) -> str:
    shapes_of_bombs = ("9^{{9^{{9^{{{}}}}}}}", "{}!!!!", r"\binom{{10^{{9}}}}{{10^{{7}} + {}}}", "7^{{7^{{9{}}}}}")
    return shapes_of_bombs[n % len(shapes_of_bombs)].format(100 + n)


def batch(kind: str, bombs: int) -> tuple[list[str], list[str]]:
    """Completions and gold answers of 512 prompts: half of the answers right, four different ones for every prompt."""
    texts, golds = [], []
    for n in range(BATCH):
        k = n // GROUP + 2
        if kind == "numbers":
            golds.append(str(k))
            texts.append((f"{k}", f"{k} apples", f"{k + 1}", rf"\frac{{{k}}}{{3}}")[n % 4])
        else:
            golds.append(rf"\frac{{{k}\sqrt{{3}}}}{{2}}")
            texts.append(
                (rf"{k}\sqrt{{\frac{{3}}{{4}}}}", rf"\frac{{\sqrt{{{3 * k * k}}}}}{{2}}", rf"\sqrt{{{k}}}", f"{k}x")[
                    n % 4
                ]
            )
    for place in range(bombs):
        texts[place * (BATCH // BOMBS)] = bomb(place)
    return [f"<answer>{text}</answer>" for text in texts], golds


def seconds(kind: str, bombs: int, gate: bool = True) -> dict:
    """Wall seconds of one batch in a pool of its own, processes started before, and the workers that it lost."""
    limits = Limits(seconds=3.0, megabytes=2048 + len(bounded._pools))  # another pool than any before
    refusal = shapes.refusal
    shapes.refusal = refusal if gate else lambda text: None
    try:
        for _ in range(limits.processes):
            answers.verify_many([rf"\boxed{{\sqrt{{{n}}}}}" for n in range(2, 10)], [r"\sqrt{2}"] * 8, limits=limits)
        completions, golds = batch(kind, bombs)
        started = time.perf_counter()
        verdicts = answers.verify_many(completions, golds, limits=limits, evaluated=kind == "numbers")
        took = time.perf_counter() - started
    finally:
        shapes.refusal = refusal
    pool = bounded._pools[limits]
    for judge in pool.all:
        judge.stop()
    return {
        "seconds": round(took, 2),
        "right": sum(verdict.correct for verdict in verdicts),
        "lost_workers": pool.patience.timeouts,
        "processes_started": sum(judge.starts for judge in pool.all),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    torch.set_num_threads(1)
    figures = compare()
    for kind in ("numbers", "expressions"):
        without = seconds(kind, 0)
        runs = {"with": seconds(kind, BOMBS), "with, shapes not known": seconds(kind, BOMBS, gate=False)}
        for run in runs.values():
            run["times"] = round(run["seconds"] / without["seconds"], 2)
        figures[kind] = {"completions": BATCH, "bombs": BOMBS, "without": without, **runs}
        print(kind, figures[kind], flush=True)
    finish("verifier", figures)


if __name__ == "__main__":
    main()
