"""The process that compares expressions: a JSON question per line in, a JSON answer per line out. Started by `bounded`,
as a script; its argument is the memory in bytes, and every question brings the seconds of CPU time it may take. The
kernel enforces both, in workers that `server` replaces. Imports nothing of tokencredit but that: a fresh process, small
and quick.

Text is read by math-verify's LaTeX grammar (ANTLR) alone. Its other reader, for plain expressions, hands text to
sympy's `parse_expr`, which evaluates Python, and the grammar does the same with the digits of every number. Here the
one is shut and the other replaced by `read_digits`: no text of a model is ever evaluated.

Three of math-verify's comparisons are replaced: of numbers, which rounds to a number of decimals and so takes all small
numbers for equal; of symbols, which joins letters and ignores their case; of equations without solutions.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DIGITS = 6  # significant digits that an inexact number must share with an exact one
# What the grammar reads as something else: it drops primes and transposes, and adds `3 4` up.
_MISREAD = re.compile(r"'|(?<![_0-9])[0-9]+\s+[0-9]|\^\s*\{?\s*(?:[TH](?![A-Za-z])|\*|\\(?:top|ast|dagger|prime|perp))")
_CURRENT = re.compile(r"\\[A-Za-z]+|I(?:_\{?(\w+)\}?)?")


def read_digits(text: str, *_: Any, **__: Any) -> Any:
    """The number that `text` writes in digits; anything else is an error."""
    from sympy import Float, Integer

    if re.fullmatch(r"-?[0-9]+", text):
        return Integer(int(text))
    if re.fullmatch(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", text):
        return Float(text)
    raise ValueError(f"no text is evaluated here: {text[:60]!r}")


def same_number(a: Any, b: Any, *_: Any) -> bool:
    """Whether two values are equal: exact ones exactly, and where one is a decimal, to six significant digits of `a`.
    Relative to their size alone, however small they are.
    """
    from sympy import Float, Integer, MatrixBase

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        a, b = a.doit(), b.doit()
        return a.shape == b.shape and all(same_number(x, y) for x, y in zip(a.flat(), b.flat()))
    a, b = a.doit(), b.doit()
    if a == b or a.free_symbols or b.free_symbols:
        return bool(a == b)
    try:
        size, difference = abs(a.evalf(30)), abs((a - b).evalf(30))
        if not (size.is_Float and size > 0):
            return False
        if not (a.has(Float) or b.has(Float)):
            return bool(difference < size * 10**-20)
        exact = a.is_Rational or b.is_Rational
        if exact and _is_decimal(a if a.is_Rational else b):
            return bool(difference < size * 10**-14)
        return bool(difference < Integer(10) ** (_floor_log10(size) - DIGITS + 1))
    except (TypeError, ValueError, AttributeError):
        return False


def differ_somewhere(a: Any, b: Any) -> bool:
    """Whether two expressions have clearly different values at a point, which takes a thousandth of the time of
    `simplify`.
    """
    from sympy import Rational

    try:
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        point = {symbol: Rational(1237 + 311 * place, 1009) for place, symbol in enumerate(symbols)}
        a, b = a.subs(point).evalf(30), b.subs(point).evalf(30)
        difference, size = abs(a - b), abs(a) + abs(b)
        return bool(size.is_Float and difference.is_Float and difference > size * 10**-9)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False


def _floor_log10(size: Any) -> int:
    from sympy import floor, log

    return floor(log(size, 10).evalf(15))


def _is_decimal(value: Any) -> bool:
    divisor = int(value.q)
    for prime in (2, 5):
        while divisor % prime == 0:
            divisor //= prime
    return divisor == 1


def load() -> tuple[Any, Any]:
    """`parse(text) -> expression` and `compare(gold, answer) -> bool`, with the ways to `parse_expr` shut."""
    import logging

    import latex2sympy2_extended.latex2sympy2 as grammar
    import math_verify.grader as grader
    import math_verify.parser as reader
    from sympy import I, Symbol

    logging.disable(logging.CRITICAL)
    reader.parse_expr = grammar.parse_expr = grammar.Number = read_digits
    grammar._Latex2Sympy.parse_number = lambda self, text: read_digits(text.replace(",", ""))
    _compare_strictly(grader)
    # Case counts. Nothing is rewritten before the grammar reads it: math-verify takes `h` and `c` for units, drops
    # primes, and reads the last side of an equation where it cannot read all.
    cased = grammar.ConversionConfig(lowercase_symbols=False)

    def parse(text: str) -> Any:
        if _MISREAD.search(text):
            return None
        text = re.sub(r"([0-9])[eE]([-+]?[0-9]+)", r"\1\\times10^{\2}", text)
        # To sympy a capital I is the imaginary unit; to the writer it is a current.
        text = _CURRENT.sub(lambda sign: f"\\variable{{I{sign[1] or ''}}}" if sign[0][0] == "I" else sign[0], text)
        read = grammar.latex2sympy(text, is_real=True, normalization_config=None, conversion_config=cased)
        return read.subs(Symbol("i", real=True), I) if hasattr(read, "free_symbols") else read

    def compare(gold: Any, answer: Any) -> bool:
        return grader.verify(gold, answer, float_rounding=DIGITS, timeout_seconds=None, allow_set_relation_comp=True)

    # Tables are built and modules imported at first use: that time is no question's. A reader that cannot do this reads
    # nothing right.
    if not compare(parse("x^2+2x+\\frac{2}{2}"), parse("(x+1.0)^2")) or not compare(
        parse("\\sqrt{-8}"), parse("2i\\sqrt{2}")
    ):
        raise ImportError(
            "math-verify does not find x^2+2x+1 equal to (x+1)^2; its version or sympy's is not one this was"
            " written for"
        )
    return parse, compare


def _compare_strictly(grader: Any) -> None:
    from sympy import Eq, simplify

    symbolic = grader.sympy_symbolic_eq

    def same_relation(gold: Any, answer: Any, *_: Any) -> bool:
        """Whether one relation is the other times a number: 2x = 6 and x = 3, 3 > x and x < 3."""
        if gold.free_symbols != answer.free_symbols or not gold.free_symbols:
            return False
        factor = simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
        if not (factor.is_number and factor.is_finite) or factor == 0:
            return False
        if isinstance(gold, Eq) or isinstance(answer, Eq):
            return isinstance(gold, Eq) and isinstance(answer, Eq)
        return type(gold) is (type(answer) if factor > 0 else grader.INVERSE_RELATIONS[type(answer)])

    def same_expression(a: Any, b: Any) -> bool:
        return not differ_somewhere(a, b) and symbolic(a, b)

    grader.sympy_numeric_eq = same_number
    grader.sympy_compare_symbols = lambda gold, answer: bool(gold == answer)
    grader.sympy_solve_and_compare = same_relation
    grader.sympy_symbolic_eq = same_expression


def judge(gold: str, answer: str, parse: Any, compare: Any) -> str:
    """The reason of the verdict: correct, wrong, unparsed, or timeout when the memory did not suffice."""
    try:
        read = parse(answer)
        return "unparsed" if read is None else "correct" if compare(parse(gold), read) else "wrong"
    except MemoryError:
        return "timeout"
    except Exception:  # the parser's own failures (recursion, grammar) are those of an answer that cannot be read
        return "unparsed"


def main(num_bytes: int) -> None:
    """Answer questions until the input ends. Whatever a library prints goes nowhere: the answers have a channel of
    their own.
    """
    spec = importlib.util.spec_from_file_location("server", Path(__file__).with_name("server.py"))
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    server.limit_memory(num_bytes)
    parse, compare = load()

    def handle(line: bytes) -> bytes:
        question = json.loads(line)
        server.limit_time(question["seconds"])
        reason = judge(question["gold"], question["answer"], parse, compare)
        server.limit_time(0)
        return json.dumps(reason).encode()

    os.write(answers, b'"ready"\n')
    os.dup2(1, 2)
    server.serve(handle, 0, answers)


if __name__ == "__main__":
    main(int(sys.argv[1]))
