"""How a question is put, and in which form the answer is asked for: the R1-Zero conversation, the plain GSM8K line, the
box.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from tokencredit.tasks.extraction import FORMS, Form

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """The words around a question. `answer_form` holds `{}` where the answer goes, `form` is the one it asks for."""

    name: str
    form: Form
    instruction: str
    layout: str
    answer_form: str

    def prompt(self, question: Prompt, chat: bool = False) -> Prompt:
        """The prompt for `question`: one string for a base model, or messages when `chat`, or when the question is
        messages already. The instruction is the system message, or stands before the text of the one there is.
        """
        if isinstance(question, str) and not chat:
            return self.layout.replace("{instruction}", self.instruction).replace("{question}", question.strip())
        messages = [{"role": "user", "content": question.strip()}] if isinstance(question, str) else question
        if not messages or messages[0]["role"] != "system":
            return [{"role": "system", "content": self.instruction}, *messages]
        said: Any = messages[0]["content"]
        before = f"{self.instruction}\n\n"
        content = [{"type": "text", "text": before}, *said] if isinstance(said, list) else before + (said or "")
        return [{**messages[0], "content": content}, *messages[1:]]

    def forms(self, strict: bool) -> tuple[Form, ...]:
        """The accepted forms: the one asked for when `strict`, else all of them."""
        return (self.form,) if strict else FORMS

    def answer(self, gold: str) -> str:
        """A completion that answers `gold` in the form asked for."""
        return self.answer_form.replace("{}", gold)


TEMPLATES = {
    # The conversation of DeepSeek-R1-Zero (arXiv:2501.12948, table 1).
    "r1": Template(
        name="r1",
        form="answer",
        instruction=(
            "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The"
            " assistant first thinks about the reasoning process in the mind and then provides the user with the"
            " answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer>"
            " tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
        ),
        layout="{instruction} User: {question} Assistant:",
        answer_form="<think> </think> <answer> {} </answer>",
    ),
    "plain": Template(
        name="plain",
        form="hash",
        instruction="Reason step by step. Then write the final answer alone on the last line, after ####.",
        layout="{instruction}\n\nQuestion: {question}\nAnswer:",
        answer_form="#### {}\n",
    ),
    "boxed": Template(
        name="boxed",
        form="boxed",
        instruction="Reason step by step, and put the final answer within \\boxed{}.",
        layout="{question}\n{instruction}\n",
        answer_form="\\boxed{{}}",
    ),
}


def template_of(name: str) -> Template:
    """The template called `name`."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown template {name!r}.{hint} Templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
