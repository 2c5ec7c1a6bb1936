r"""Expressions that are not handed to the algebra system, by their shape alone.

An answer such as ``9^{9^{9^{9}}}`` makes a computer algebra system compute for ever, or fill the memory. The shapes
that do so are known: towers of powers, factorials of factorials, huge exponents, binomials and digits, deep nesting,
long expressions, and integrals, sums, limits, which ask for work instead of doing it. They are told here from the text,
in microseconds. What gets past is bounded in time and memory (`bounded`).
"""

import re

MAX_LENGTH = 400  # characters of one expression
MAX_DEPTH = 12  # brackets within brackets
MAX_DIGITS = 60  # of one number
MAX_EXPONENT = 2100  # of a number; contest answers such as 2^{2024} - 1 are below
MAX_SYMBOLIC_EXPONENT = 30  # of a bracket with variables
MAX_ARGUMENT = 300  # of a factorial or a binomial

_WORK = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|limsup|liminf|bigcup|bigcap|Gamma|zeta|partial|nabla|derivative|pmod|mod|uparrow|mathop)(?![A-Za-z])"
    r"|\\frac\s*\{\s*d|\\frac\s*\{\s*\\mathrm|\\(?:def|newcommand|let|input|include|write|csname)(?![A-Za-z])"
)
_MARK = re.compile(r"\\[{}]|\\.|[()\[\]{}]")
_BIG_ARGUMENT = re.compile(r"\\d?t?binom|\\choose|!")
_FUNCTION = re.compile(r"\\(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|sinh|cosh|tanh)(?![A-Za-z])")


def refusal(text: str) -> str | None:
    """Why `text` is not handed to the algebra system, or None where it is."""
    if len(text) > MAX_LENGTH:
        return "long"
    if _depth(text) > MAX_DEPTH:
        return "nesting"
    if any(len(number) > MAX_DIGITS for number in re.findall(r"[0-9]+", text)):
        return "digits"
    if _WORK.search(text):
        return "work"
    if re.search(r"!\s*!|!\s*[)}\]]\s*!|[)}\]]\s*!", text) or re.search(r"\^\s*\{?[^{}]*!", text):
        return "factorial"
    arguments = _BIG_ARGUMENT.search(text)
    if arguments and ("^" in text or any(int(number) > MAX_ARGUMENT for number in re.findall(r"[0-9]+", text))):
        return "factorial"
    if len(re.findall(r"!", text)) > 6 or len(_FUNCTION.findall(text)) > 10:
        return "long"
    if _FUNCTION.search(text) and _nested_functions(text) > 3:
        return "nesting"
    return _power(text)


def _depth(text: str) -> int:
    depth = deepest = 0
    for mark in _MARK.finditer(text):
        depth += (mark[0] in ("\\{", "(", "[", "{")) - (mark[0] in ("\\}", ")", "]", "}"))
        deepest = max(deepest, depth)
    return deepest


def _nested_functions(text: str) -> int:
    """How deep functions stand within one another's arguments."""
    deepest, depth, opened, pending = 0, 0, [], False
    for mark in re.finditer(rf"{_FUNCTION.pattern}|\\[{{}}]|\\.|[()\[\]{{}}]", text):
        if _FUNCTION.match(mark[0]):
            depth, pending = depth + (not pending), True
            deepest = max(deepest, depth)
        elif mark[0] in ("(", "{", "[", "\\{"):
            opened.append(pending)
            pending = False
        elif mark[0] in (")", "}", "]", "\\}") and opened and opened.pop():
            depth -= 1
    return deepest


def _power(text: str) -> str | None:
    """Towers, and exponents that are too large for their base."""
    for mark in re.finditer(r"\^\s*", text):
        exponent = _operand(text, mark.end())
        base = _base(text, mark.start())
        after = text[mark.end() + len(exponent) :].lstrip()
        symbolic = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", base)) and len(base) > 1
        numbers = [int(number) for number in re.findall(r"[0-9]+", exponent)]
        if after.startswith("^") or _tower(exponent):
            return "tower"
        if re.search(r"\\(?:cdot|times)|\*|[0-9]\s*[({]", exponent) and len(numbers) > 1 and max(numbers) > 20:
            return "exponent"
        if any(number > MAX_EXPONENT for number in numbers):
            return "exponent"
        if symbolic and any(number > MAX_SYMBOLIC_EXPONENT for number in numbers):
            return "exponent"
        if re.search(r"[0-9]{5}", base) and any(number > 100 for number in numbers):
            return "exponent"
        if "^" in base and len(numbers) > 0 and max(numbers) > 12 and re.search(r"[0-9]", base):
            return "tower"
    return None


def _tower(exponent: str) -> bool:
    """Whether an exponent holds a power that is not a small one: `x^{2^3}`, `e^{-x^2}` are small."""
    powers = list(re.finditer(r"\^\s*", exponent))
    if len(powers) > 1:
        return True
    for power in powers:
        inner = _operand(exponent, power.end()).strip("{}() ")
        base = _base(exponent, power.start())
        small = re.fullmatch(r"-?[0-9]", inner) and re.fullmatch(r"[A-Za-z]|[0-9]", base.strip("{}() "))
        if not small or (base.isdigit() and int(base) ** abs(int(inner)) > MAX_EXPONENT):
            return True
    return False


def _operand(text: str, start: int) -> str:
    """What stands at `start`: a group in brackets, a command, or one sign."""
    if text[start : start + 1] not in ("{", "("):
        match = re.compile(r"-?(?:\\[A-Za-z]+(?:\s*\{[^{}]*\})*|[0-9]+|.)", re.DOTALL).match(text, start)
        return match[0] if match else ""
    depth = 0
    for mark in _MARK.finditer(text, start):
        depth += (mark[0] in ("\\{", "(", "[", "{")) - (mark[0] in ("\\}", ")", "]", "}"))
        if depth == 0:
            return text[start : mark.end()]
    return text[start:]


def _base(text: str, end: int) -> str:
    """What stands before `end`: a group in brackets, a number, or one sign."""
    text = text[:end].rstrip()
    if not text or text[-1] not in ")}]":
        match = re.search(r"(?:[0-9.]+|\\[A-Za-z]+|.)$", text, re.DOTALL)
        return match[0] if match else ""
    depth = 0
    for place in range(len(text) - 1, -1, -1):
        depth += (text[place] in ")}]") - (text[place] in "({[")
        if depth == 0:
            return text[place:]
    return text
