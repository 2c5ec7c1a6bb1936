r"""One spelling for everything that is written in several: signs, spaces, LaTeX layout, and what surrounds an answer.

`tidy` turns `x²`, `½`, `≤`, `∞`, `90°`, `\dfrac12`, `\left(`, `{\bf 12}`, `\underline{12}`, `$12$.` and an aligned
environment into one kind of LaTeX on one line. It never decides what is equal: where a sign could matter it stays.
"""

import re
import unicodedata

from tokencredit.tasks.vocabulary import WORDS

_SIGNS = {
    **dict.fromkeys("−–‑‐－", "-"),
    **dict.fromkeys("\u00a0\u202f\u2009\u2002\u2003\u3000\t", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **{"⁄": "/", "∕": "/", "′": "'", "’": "'", "℃": r"^\circ C", "℉": r"^\circ F", "∛": r"\sqrt[3] "},
    **{"。": ".", "、": ",", "“": '"', "”": '"', "…": "..."},
    **{sign: f"\\{command} " for sign, command in zip(WORDS["signs"][::2], WORDS["signs"][1::2])},
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) != "－"},
    "°": r"^\circ ",
}
_TABLE = str.maketrans(_SIGNS)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]")
_LAYOUT = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|middle)(?=\s*(?:[()\[\].|/]|\\[{}|]|\\[lr](?:angle|ceil|floor|vert|brace)))", ""),
        (r"\\(?:big|Big|bigg|Bigg)[lrm]?(?=\s*[()\[\]|\\])", ""),
        (r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:limits|nolimits)(?![A-Za-z])", ""),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|sf|tt|bfseries)(?![A-Za-z])\s*", ""),
        (r"\\(?:text)?color\s*\{\s*\w+\s*\}", ""),
        (r"\\!\s*", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick)space(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:le|leqslant)(?![A-Za-z])", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![A-Za-z])", r"\\geq"),
        (r"\\ne(?![A-Za-z])", r"\\neq"),
        (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:mathrm|text|operatorname)\s*\{\s*([ei])\s*\}", r"\1"),
        (r"\\(?:mathrm|textrm|textit|textsf|textnormal|mbox|hbox)(?=\s*\{)", r"\\text"),
        (r"\\textbf(?=\s*\{)", r"\\text"),
        (r"\\(?:mathbf|boldsymbol|bm|underline|mathit|mathsf|mathnormal|underbar|emph|pmb)(?=\s*\{)", ""),
        (r"\\cdotp(?![A-Za-z])", r"\\cdot"),
        (r"\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
        (r"\\%", "%"),
    )
]
_FRAC_LEFT = re.compile(r"\\frac\s*([0-9A-Za-z]|\\pi(?![A-Za-z]))(?=\s*[{0-9A-Za-z\\])")
_FRAC_RIGHT = re.compile(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])")
_SQRT = re.compile(r"\\sqrt\s*(\[\w\])?\s*(\d+|[A-Za-z]|\\pi)(?![A-Za-z])")
_SQRT_GROUP = re.compile(r"\\sqrt\s*(\[\w\])?\s*(\([^()]*\))")
_TAGS = re.compile(
    r"<(?P<tag>b|i|em|strong|p|u|span|div|code|math|answer|big|center)>(?P<inner>.*)</(?P=tag)>", re.DOTALL
)
_ENVIRONMENT = re.compile(
    r"\\begin\s*\{(?P<name>(?:align|aligned|gather|gathered|equation|split|multline)\*?)\}"
    r"(?P<inner>.*)\\end\s*\{(?P=name)\}",
    re.DOTALL,
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?(?:(?:correct|final|right)\s+)?"
    r"(?:answer|option|choice)\s*(?:is\s*:?|:|=)\s*|答案[是为]?\s*[:：]?\s*|(?:=|\\approx)\s*",
    re.IGNORECASE,
)
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(?P<inner>[^$]*)\$\$",
        r"\$(?P<inner>(?:[^$\\]|\\.)+)\$",
        r"\\\((?P<inner>.*)\\\)",
        r"\\\[(?P<inner>.*)\\\]",
        r"\*\*(?P<inner>[^*]*)\*\*",
        r"\*(?P<inner>[^*]+)\*",
        r"__(?P<inner>[^_]*)__",
        r"`(?P<inner>[^`]*)`",
        r'"(?P<inner>[^"]*)"',
        r"\\text\s*\{(?P<inner>[^{}]*)\}",
        r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{R\}\s*)?(?:\\mid|\||:)\s*(?P<inner>.*)\\\}",
    )
]
_MATHS_FIRST = re.compile(r"\$(?P<inner>(?:[^$\\]|\\.)+)\$(?P<rest>[^$]+)")  # `$3$ hours`
# What is not shown, or shown as struck out, says nothing; an answer with it is not read.
_HIDDEN = re.compile(
    r"\\[hv]?phantom|\\[bx]?cancel|\\sout|\\st(?![A-Za-z])|\\not(?![A-Za-z])|~~|<(?:s|del|strike|!--)\b|<!--"
    r"|\\tag|\\label|\\hspace|\\rlap|\\llap|\\smash|\\(?:text)?color\s*\{\s*white|\\require"
)


def is_hidden(text: str) -> bool:
    r"""Whether something in `text` is not shown or is struck out: ``\phantom``, ``\cancel``, ``<del>``, white text."""
    return _HIDDEN.search(text) is not None


def tidy(text: str) -> str:
    """`text` in one spelling, without what surrounds an answer."""
    text = _RAISED.sub(lambda m: f"^{{{_plain(m[0])}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{_plain(m[0])}}}", text)
    text = _VULGAR.sub(lambda m: f" {_plain(m[0])}", text)
    text = _layout(text.translate(_TABLE))
    for _ in range(8):
        before = text
        text = _unwrapped(" ".join(text.split()))
        if text == before:
            break
    return text


def _plain(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs)


def _layout(text: str) -> str:
    for pattern, new in _LAYOUT:
        text = pattern.sub(new, text)
    text = _FRAC_LEFT.sub(r"\\frac{\1}", text)
    text = _FRAC_RIGHT.sub(r"\1{\2}", text)
    text = _SQRT.sub(r"\\sqrt\1{\2}", text)
    return _SQRT_GROUP.sub(r"\\sqrt\1{\2}", text)


def _unwrapped(text: str) -> str:
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if text.endswith("\\\\"):
        text = text[:-2].rstrip()
    for wrapper in _WRAPPERS:
        if match := wrapper.fullmatch(text):
            text = match["inner"].strip()
    if match := _MATHS_FIRST.fullmatch(text):
        text = f"{match['inner'].strip()} {match['rest'].strip()}"
    if match := _TAGS.fullmatch(text):
        text = match["inner"].strip()
    if match := _ENVIRONMENT.fullmatch(text):
        rows = re.sub(r"\\\\(?:\[[^\]]*\])?\s*(?==|&\s*=)", " ", match["inner"].replace(r"\&", ""))
        text = re.sub(r"\\\\\s*$", "", rows.strip()).replace(r"\\", " , ").replace("&", "").strip()
    if text.startswith("{") and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    if (match := _LEAD.match(text)) and match.end() < len(text):
        text = text[match.end() :]
    return text


def _closes(text: str) -> int:
    """Where the brace that opens `text` is closed; -1 where it is not."""
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == "}":
            return mark.start()
    return -1


def is_balanced(text: str) -> bool:
    """Whether the braces of `text` are closed in order."""
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth < 0:
            return False
    return depth == 0
