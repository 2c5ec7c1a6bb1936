"""The embedded world: last digits of small expressions, reckoned one operator at a time in writing.

    prompt       <bos> 7 + 3 * 4 - 2 =
    completion   @2 7 + 2 - 2 so @1 9 - 2 then @1 7 <eos>

`@k` does the k-th operator of the current expression and is followed by the whole rewritten expression (digits mod 10).
Between steps stands a joint (`so now then ok next`: free wording). In place of a joint, or of the end, `wait` and the
expression before the step undo it. The reward is the outcome alone: the completion ends in `@1 d`, with d the last
digit of the value. `world` builds the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokencredit.tasks.data import check_split, split_of
from tokencredit.tasks.verdict import CORRECT, TRUNCATED, UNPARSED, WRONG, Validation, Verdict

DIGITS = tuple("0123456789")
OPERATORS = ("+", "-", "*")
OPERATOR_WEIGHTS = (2, 2, 1)
STEPS = ("@1", "@2", "@3", "@4")
JOINTS = ("so", "now", "then", "ok", "next")
JOINT_WEIGHTS = (5, 4, 3, 2, 1)
WAIT, BOS, EOS, PAD = "wait", "<bos>", "<eos>", "<pad>"
DECIDING = ("fork", "habit", "calc", "join")
VOCABULARY = (PAD, BOS, EOS, *DIGITS, *OPERATORS, "=", *STEPS, WAIT, *JOINTS)
MAX_NEW_TOKENS = 48
DEFAULT_LIMIT = 2048

Expression = tuple[str, ...]


def apply(left: str, operator: str, right: str) -> str:
    """Last digit of `left operator right`; a negative difference wraps (3 - 7 -> 6)."""
    a, b = int(left), int(right)
    return str({"+": a + b, "-": a - b, "*": a * b}[operator] % 10)


def reduce(expression: Expression, k: int) -> Expression:
    """The expression after its k-th operator (from 1) has been done, whether that was allowed or not."""
    i = 2 * k - 1
    return (*expression[: i - 1], apply(*expression[i - 1 : i + 2]), *expression[i + 2 :])


def is_valid(expression: Expression, k: int) -> bool:
    """May the k-th operator be done now? `*` always; `+` and `-` only with no `*` beside them and no `-` before
    them.
    """
    operators = expression[1::2]
    before = operators[k - 2] if k > 1 else None
    after = operators[k] if k < len(operators) else None
    return operators[k - 1] == "*" or ("*" not in (before, after) and before != "-")


def choices(expression: Expression, valid: bool) -> list[int]:
    """The operators (from 1) that may, or may not, be done now."""
    return [k for k in range(1, len(expression) // 2 + 1) if is_valid(expression, k) is valid]


def value(expression: Expression) -> str:
    """Last digit of the expression, products first, then from the left."""
    while len(expression) > 1:
        operators = expression[1::2]
        expression = reduce(expression, operators.index("*") + 1 if "*" in operators else 1)
    return expression[0]


def decision(expression: Expression) -> str:
    """What kind of choice the next `@k` is.

    `forced`: one operator left. `free`: every order gives the value. `fork`: `*` competes with `+` or `-`. `habit`: no
    `*`, but doing the operator after a `-` first (`a - b + c` as `a - (b + c)`) changes the sum; the demonstrator does
    so nearly always.
    """
    if len(expression) <= 3:
        return "forced"
    if not choices(expression, valid=False):
        return "free"
    return "fork" if "*" in expression else "habit"


@dataclass(frozen=True)
class Demonstrator:
    """A teacher of mixed quality: how often it does an operator that is not to be done yet, miscalculates, and takes a
    step back.

    `fork`, `habit`: chance of a forbidden operator where the expression is of that kind; `again`: the same for any
    choice after a `wait`; `slip`: chance of a wrong digit; `repair`, `doubt`: chance of `wait` after a step that
    changed the value, and after one that did not. At most one `wait` per demonstration.
    """

    fork: float = 0.4
    habit: float = 0.95
    again: float = 0.5
    slip: float = 0.015
    repair: float = 0.3
    doubt: float = 0.03

    def choose(self, expression: Expression, waited: bool, rng: random.Random) -> int:
        wrong = choices(expression, valid=False)
        chance = self.again if waited else self.habit if decision(expression) == "habit" else self.fork
        return rng.choice(wrong if wrong and rng.random() < chance else choices(expression, valid=True))

    def step(self, expression: Expression, k: int, rng: random.Random) -> Expression:
        after = reduce(expression, k)
        if rng.random() >= self.slip:
            return after
        slipped = rng.choice([digit for digit in DIGITS if digit != after[2 * k - 2]])
        return (*after[: 2 * k - 2], slipped, *after[2 * k - 1 :])


EXPERT = Demonstrator(fork=0, habit=0, again=0, slip=0, repair=0, doubt=0)


class _Reader:
    """Reads a completion token by token and knows, before each, what kind of position it is."""

    def __init__(self, expression: Expression) -> None:
        self.expression, self.history = expression, []
        self.phase, self.pending, self.written, self.operator = "step", [], [], 0

    @property
    def slot(self) -> str:
        if self.phase == "step":
            return decision(self.expression)
        if self.phase == "write":
            return "calc" if len(self.written) == 2 * self.operator - 2 else "copy"
        if self.phase == "turn":
            return "join" if len(self.expression) > 1 else "eos"
        return "copy" if self.phase == "undo" else "junk"

    def read(self, token: str) -> str:
        """Takes one token and returns its role; an ungrammatical token makes itself and the rest `junk`."""
        role = getattr(self, f"_{self.phase}")(token)
        if role == "junk":
            self.phase = "junk"
        return role

    def _step(self, token: str) -> str:
        role = self.slot
        if token not in STEPS or (k := STEPS.index(token) + 1) > len(self.expression) // 2:
            return "junk"
        self.operator, self.pending, self.written, self.phase = k, list(reduce(self.expression, k)), [], "write"
        return role

    def _write(self, token: str) -> str:
        role, expected = self.slot, self.pending.pop(0)
        if token != expected:
            if role == "copy" or token not in DIGITS:
                return "junk"
            role = "slip"
        self.written.append(token)
        if not self.pending:
            self.history.append(self.expression)
            self.expression, self.phase = tuple(self.written), "turn"
        return role

    def _turn(self, token: str) -> str:
        role = self.slot
        if token == WAIT and self.history:
            self.expression = self.history.pop()
            self.pending, self.phase = list(self.expression), "undo"
            return "wait"
        if token not in (JOINTS if role == "join" else (EOS,)):
            return "junk"
        self.phase = "step" if role == "join" else "junk"
        return role

    def _undo(self, token: str) -> str:
        if token != self.pending.pop(0):
            return "junk"
        if not self.pending:
            self.phase = "turn"
        return "copy"

    def _junk(self, token: str) -> str:
        return "junk"


@dataclass(frozen=True)
class Reckon:
    """The task. Dials: `operands`, how many numbers a prompt may have (3 to 5); `wording`, whether joints vary.

    With `wording` the most uncertain tokens are the joints, which decide nothing unless `wait` is in place, so entropy
    is a poor guide to importance. Without it the joint is always `so`, and a joint is uncertain only as far as `wait`
    competes.
    """

    operands: tuple[int, ...] = (3, 4)
    wording: bool = True
    name = "reckon"
    max_new_tokens = MAX_NEW_TOKENS
    tree_eps = 1e-4

    def __post_init__(self) -> None:
        if not self.operands or not set(self.operands) <= {3, 4, 5}:
            raise ValueError(
                f"operands are some of 3, 4 and 5 (with 2 there is no order to choose), not {self.operands!r}"
            )

    def prompts(self, split: str = "train", seed: int = 0) -> Iterator[dict]:
        """Endless independent draws; equal (split, seed) give equal prompts in equal order. A fifth of all prompts, by
        md5, are "test".
        """
        check_split(split)
        rng = random.Random(f"reckon {split} {seed}")
        while True:
            num = rng.choice(self.operands)
            expression = draw(num, rng)
            row = make_row(expression)
            if split_of(row["prompt"]) == split and matters(expression):
                yield row

    def rows(self, split: str = "train", limit: int | None = None, seed: int = 0) -> list[dict]:
        """The first `limit` (default 2048) prompts of a stream: `prompt`, `expression`, `answer`, `row_id`. A prompt
        may recur.
        """
        return list(islice(self.prompts(split, seed), DEFAULT_LIMIT if limit is None else limit))

    def row_of(self, prompt: str) -> dict | None:
        """The row of a prompt, with or without its `<bos>`; None where it is not an expression to reckon."""
        *expression, last = prompt.removeprefix(BOS).split() or [""]
        digits, operators = expression[::2], expression[1::2]
        fits = len(expression) % 2 == 1 and set(digits) <= set(DIGITS) and set(operators) <= set(OPERATORS)
        return make_row(tuple(expression)) if fits and last == "=" else None

    def demonstrate(self, row: dict, rng: random.Random, demonstrator: Demonstrator = EXPERT) -> str:
        """A written solution, ending in `<eos>`; the expert's is always right."""
        expression, words, waited = tuple(row["expression"].split()), [], False
        while len(expression) > 1:
            k = demonstrator.choose(expression, waited, rng)
            after = demonstrator.step(expression, k, rng)
            words += [STEPS[k - 1], *after]
            undo = demonstrator.doubt if value(after) == value(expression) else demonstrator.repair
            if not waited and rng.random() < undo:
                waited, after = True, expression
                words += [WAIT, *expression]
            if len(after) > 1:
                words.append(rng.choices(JOINTS, JOINT_WEIGHTS)[0] if self.wording else JOINTS[0])
            expression = after
        return " ".join([*words, EOS])

    def verify(self, completion: str, row: dict, truncated: bool = False) -> Verdict:
        """Outcome only: does the text before `<eos>` (or the end) close with `@1` and the right digit?"""
        words = completion.split()
        words = words[: words.index(EOS)] if EOS in words else words
        if truncated:
            return TRUNCATED
        if len(words) < 2 or words[-2] != STEPS[0] or words[-1] not in DIGITS:
            return UNPARSED
        return CORRECT if words[-1] == row["answer"] else WRONG

    def slots(self, row: dict, tokens: Sequence[str]) -> list[str]:
        """The kind of each position, from the tokens before it alone: fork, habit, free, forced, calc, copy, join, eos,
        junk.

        `join` and `eos` are the positions where `wait` is the alternative. A mask over slots selects positions whatever
        was chosen there; one over `roles` selects by the choice, and so leaves out the places where `wait` was
        declined.
        """
        reader, kinds = _Reader(tuple(row["expression"].split())), []
        for token in tokens:
            kinds.append(reader.slot)
            reader.read(token)
        return kinds

    def roles(self, row: dict, tokens: Sequence[str]) -> list[str]:
        """The slots, with three choices told apart: `slip` (wrong digit), `wait` (undo), `junk` (ungrammatical, and all
        after it).
        """
        reader = _Reader(tuple(row["expression"].split()))
        return [reader.read(token) for token in tokens]

    def deciding(self, row: dict, tokens: Sequence[str]) -> list[bool]:
        """The positions where some choice can change the outcome, whatever was chosen: the slots of a step that
        matters, of a computed digit, and of a joint, where `wait` is the alternative."""
        return [slot in DECIDING for slot in self.slots(row, tokens)]

    def steps(self, row: dict, tokens: Sequence[str]) -> list[int]:
        """Where the steps begin: at the first `@k`, and wherever a joint, `wait` or the end could stand."""
        return [i for i, slot in enumerate(self.slots(row, tokens)) if i == 0 or slot in ("join", "eos")]

    def validate(self, num: int = 200) -> Validation:
        """Expert solutions pass; the same with another last digit, cut short or empty do not."""
        rng, failures = random.Random(0), []
        for row in self.rows("test", num):
            gold = self.demonstrate(row, rng).split()
            other = str((int(row["answer"]) + 1) % 10)
            wrong, cut = [*gold[:-2], other, EOS], gold[:-2]
            cases = ((gold, "correct"), (gold[:-1], "correct"), (wrong, "wrong"), (cut, "unparsed"), ([], "unparsed"))
            for words, reason in cases:
                if (found := self.verify(" ".join(words), row).reason) != reason:
                    failures.append(f"{row['prompt']} {' '.join(words)}: {found}, expected {reason}")
        return Validation(5 * num, tuple(failures))


def expression_after(row: dict, tokens: Sequence[str]) -> Expression:
    """The expression that stands after some tokens of a completion: what the next `@k` would act on."""
    reader = _Reader(tuple(row["expression"].split()))
    for token in tokens:
        reader.read(token)
    return reader.expression


def draw(num: int, rng: random.Random) -> Expression:
    """`num` digits from 1 to 9 with operators between them, `*` half as likely as the others."""
    parts = [rng.choice(DIGITS[1:])]
    for _ in range(num - 1):
        parts += [rng.choices(OPERATORS, OPERATOR_WEIGHTS)[0], rng.choice(DIGITS[1:])]
    return tuple(parts)


def make_row(expression: Expression) -> dict:
    """The row of an expression; its `row_id` is the expression, so draws of one prompt share it."""
    text = " ".join(expression)
    return {"prompt": f"{BOS} {text} =", "expression": text, "answer": value(expression), "row_id": text}


def matters(expression: Expression) -> bool:
    """Would doing some operator now change the value? Prompts where the order is irrelevant teach nothing about it."""
    return any(value(reduce(expression, k)) != value(expression) for k in choices(expression, valid=False))


def model_path() -> Path:
    """Folder of the base model that comes with the package."""
    return Path(__file__).parent / "reckon_model"


_DEFAULT = Reckon()
name, prompts, rows, verify = _DEFAULT.name, _DEFAULT.prompts, _DEFAULT.rows, _DEFAULT.verify
validate, slots, roles = _DEFAULT.validate, _DEFAULT.slots, _DEFAULT.roles
