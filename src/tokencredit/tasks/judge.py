"""The process that compares expressions: a JSON question per line in, a JSON answer per line out. Started by `bounded`,
as a script.

Arguments: seconds of CPU time per question, bytes of memory. The kernel enforces both. The timer's signal keeps its
default action, which ends the process even while it is inside one long operation on integers that no Python handler
could interrupt; CPU time rather than wall time, so that a busy machine does not change a verdict. Imports nothing of
tokencredit: a fresh process, small and quick.

Text is read by math-verify's LaTeX grammar (ANTLR) alone. Its other reader, for plain expressions, hands text to
sympy's `parse_expr`, which evaluates Python, and the grammar does the same with the digits of every number. Here the
one is shut and the other replaced by `read_digits`: no text of a model is ever evaluated.
"""

import json
import os
import re
import sys
from typing import Any

DIGITS = 6  # decimals that two inexact numbers must share


def read_digits(text: str, *_: Any, **__: Any) -> Any:
    """The number that `text` writes in digits; anything else is an error."""
    from sympy import Float, Integer

    if re.fullmatch(r"-?[0-9]+", text):
        return Integer(int(text))
    if re.fullmatch(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", text):
        return Float(text)
    raise ValueError(f"no text is evaluated here: {text[:60]!r}")


def load() -> tuple[Any, Any]:
    """`parse(text) -> list of expressions` and `verify(gold, answer) -> bool`, with the ways to `parse_expr` shut."""
    import logging

    import latex2sympy2_extended.latex2sympy2 as grammar
    import math_verify.parser as reader
    from math_verify import LatexExtractionConfig, verify

    logging.disable(logging.CRITICAL)
    reader.parse_expr = grammar.parse_expr = grammar.Number = read_digits
    grammar._Latex2Sympy.parse_number = lambda self, text: read_digits(text.replace(",", ""))
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def parse(text: str) -> list[Any]:
        # The whole text is one expression: no sentence is searched for something that fits.
        return reader.parse(
            f"\\boxed{{{text}}}", extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=None
        )

    def compare(gold: Any, answer: Any) -> bool:
        return verify(gold, answer, float_rounding=DIGITS, timeout_seconds=None)

    # Tables are built and modules imported at first use: that time is no question's. A reader that cannot do this reads
    # nothing right.
    if not compare(parse("x^2+2x+\\frac{2}{2}"), parse("(x+1.0)^2")):
        raise ImportError(
            "math-verify does not find x^2+2x+1 equal to (x+1)^2; its version or sympy's is not one this was"
            " written for"
        )
    return parse, compare


def judge(gold: str, answer: str, parse: Any, compare: Any) -> str:
    """The reason of the verdict: correct, wrong, unparsed, or timeout when the memory did not suffice."""
    try:
        read = parse(answer)
        return "unparsed" if not read else "correct" if compare(parse(gold), read) else "wrong"
    except MemoryError:
        return "timeout"
    except Exception:  # the parser's own failures (recursion, grammar) are those of an answer that cannot be read
        return "unparsed"


def limit_memory(num_bytes: int) -> None:
    """Cap the address space and leave no core file, where the system knows such limits."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    except (ImportError, ValueError, OSError):
        return


def limit_time(seconds: float) -> None:
    """End this process after `seconds` more of CPU time; 0 calls it off."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a process may be born ignoring it
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main(seconds: float, num_bytes: int) -> None:
    """Answer questions until the input ends. Whatever a library prints goes nowhere: the answers have a channel of
    their own.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit_memory(num_bytes)
    parse, compare = load()
    print(json.dumps("ready"), file=answers, flush=True)
    os.dup2(1, 2)
    for line in sys.stdin.buffer:
        question = json.loads(line)
        limit_time(seconds)
        reason = judge(question["gold"], question["answer"], parse, compare)
        limit_time(0)
        print(json.dumps(reason), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
