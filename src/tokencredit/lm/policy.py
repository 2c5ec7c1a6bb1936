"""Policy: a model on a task, as it is sampled; and PolicyConfig, the choices that name one and open it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from tokencredit.durable import read_mapping
from tokencredit.lm.completions import Completion, sample
from tokencredit.lm.distribution import Settings
from tokencredit.lm.load import EMBEDDED, load_config, load_model, load_tokenizer, resolve_model, run_of
from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.lm.prefix_sampler import ROWS, PrefixSampler
from tokencredit.lm.prompts import Prompt, encode_prompt, encode_prompts
from tokencredit.lm.room import Room
from tokencredit.lm.sampling import Progress, end_tokens
from tokencredit.lm.text import pieces
from tokencredit.tasks import load
from tokencredit.tasks.reckon import VOCABULARY
from tokencredit.tasks.task import Roles, Row, Task
from tokencredit.tasks.verdict import Verdict


@dataclass(frozen=True, eq=False)
class Policy:
    """A model with its tokenizer on a task, at a temperature, up to a length, asked in a chat or in plain text.

    chat           as `lm.prompts.encode_prompt` takes it
    name           as the user called the model
    top_k, top_p   of sampling; 0 and 1 keep every token
    memory         bytes that passes are sized for, as `lm.room.Room.of` takes them
    """

    model: CausalModel
    tokenizer: Tokenizer
    task: Task
    temperature: float = 1.0
    max_new_tokens: int = 0
    chat: bool | None = None
    name: str = ""
    top_k: int = 0
    top_p: float = 1.0
    memory: int | None = None

    def __post_init__(self) -> None:
        if not self.max_new_tokens:
            object.__setattr__(self, "max_new_tokens", usual_limit(self.task, self.model.config))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end a completion."""
        return end_tokens(self.model, self.tokenizer)

    @property
    def settings(self) -> Settings:
        """How it is sampled."""
        return Settings(self.temperature, self.top_k, self.top_p)

    def sampler(self, batch: int = ROWS) -> PrefixSampler:
        """Continues prefixes by this policy, at most `batch` rows at a time and no more than there is room for."""
        return PrefixSampler(self.model, ends=self.ends, settings=self.settings, batch=batch, memory=self.memory)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        num: int,
        *,
        seed: int,
        batch: int = ROWS,
        greedy: bool = False,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[Completion]]:
        """`num` completions of every prompt (token ids), as `lm.completions.sample` draws them."""
        return sample(
            self.model,
            self.tokenizer,
            prompts,
            num,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if greedy else self.temperature,
            seed=seed,
            batch=batch,
            memory=self.memory,
            progress=progress,
            first=first,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        return encode_prompt(self.tokenizer, prompt, self.chat)

    def encode_rows(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of the rows' prompts; ValueError names a row that is empty or too long for the model's context, and
        says so where there is no row.
        """
        if not rows:
            raise ValueError(
                f"{self.task.name} has no prompts in the part that was asked for: of a file, four fifths are --split"
                " train and the rest --split test; --option test=held_out.jsonl names a file for the latter"
            )
        return encode_prompts(self.tokenizer, rows, self.model.config, self.max_new_tokens, self.chat)

    def text(self, ids: Sequence[int]) -> str:
        """What a completion says: decoded, without special tokens; the text that the task verifies."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What every token adds to the text [T]: the way to show a token."""
        return pieces(self.tokenizer, ids)

    def verdict(self, ids: Sequence[int], row: Row, truncated: bool) -> Verdict:
        """The task's verdict on a completion."""
        return self.task.verify(self.text(ids), row, truncated)

    def roles(self, row: Row, ids: Sequence[int]) -> list[str] | None:
        """The role of every token [T]; None where the task knows none."""
        if not isinstance(self.task, Roles):
            return None
        return self.task.roles(row, self.tokenizer.convert_ids_to_tokens(list(ids)))


@dataclass(frozen=True)
class PolicyConfig:
    """Which policy. What is None follows the training run that the model is of, then the task, then the defaults.

    model            a path, a hub name, a run directory (its last checkpoint), or "reckon", the shipped model
    task, options    what `tasks.load` takes; the shipped world's where the model speaks its language
    temperature      of sampling, 1 by default
    max_new_tokens   length limit, `usual_limit` by default
    chat             True: text prompts are asked as a user's message; False: they stay text
    dtype, device    as torch calls them; by default a GPU where there is one and the checkpoint's own dtype there, else
                     float32 on the CPU
    memory           bytes that the process may take; no part of what is asked, and in no record
    """

    model: str = EMBEDDED
    task: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    max_new_tokens: int | None = None
    chat: bool | None = None
    dtype: str | None = None
    device: str | None = None
    memory: int | None = field(default=None, metadata={"identity": False})

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be positive and finite, got {self.temperature:g}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")

    def settled(self) -> PolicyConfig:
        """With everything that is None filled in, but dtype and device; what a record should hold.

        ValueError where no task is named and none can be told from the model.
        """
        run = run_of(self.model)
        own = dict(read_mapping(run / "run.json", "config")["config"]) if run else {}
        same = own if self.task in (None, own.get("task")) else {}
        task = self.task or own.get("task") or self.named_task()
        if not task:
            raise ValueError(
                f"no task is named, and {self.model} is not a run that would tell it: name one with --task, for example"
                " --task gsm8k, --task train.jsonl, or --task verify.py:verify --option path=train.jsonl"
            )
        found = replace(self, task=task, options={**same.get("task_options", {}), **self.options})
        limit = self.max_new_tokens or same.get("max_new_tokens") or found._usual_limit()
        temperature = self.temperature or own.get("temperature") or 1.0
        chat = own.get("chat") if self.chat is None else self.chat
        return replace(found, temperature=temperature, max_new_tokens=limit, chat=chat)

    def named_task(self) -> str | None:
        """The task that is named, or that the model tells: its run's, or the shipped world's where it speaks its
        language; None where nothing does.
        """
        if self.task is not None:
            return self.task
        if run := run_of(self.model):
            return read_mapping(run / "run.json", "config")["config"].get("task") or None
        speaks = (
            self.model == EMBEDDED or set(VOCABULARY) <= load_tokenizer(resolve_model(self.model)).get_vocab().keys()
        )
        return EMBEDDED if speaks else None

    def load_task(self) -> Task:
        """The task alone."""
        return load(self.task or EMBEDDED, **self.options)

    def open(self) -> Policy:
        """Load it. Whatever can be refused is refused before the model's weights are read."""
        found = self.settled()
        path, task = resolve_model(self.model), found.load_task()
        tokenizer = load_tokenizer(path)
        if found.chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"--chat: the tokenizer of {self.model} has no chat template; leave it out for plain text")
        model = load_model(path, dtype=self.dtype, device=self.device)
        Room.of(model, self.memory)
        return Policy(
            model,
            tokenizer,
            task,
            found.temperature or 1.0,
            found.max_new_tokens or 0,
            found.chat,
            self.model,
            memory=self.memory,
        )

    def as_dict(self) -> dict[str, Any]:
        """What a record should hold: which policy, not what it may take."""
        found = asdict(self) | {"options": dict(self.options)}
        del found["memory"]
        return found

    def _usual_limit(self) -> int:
        return usual_limit(self.load_task(), load_config(resolve_model(self.model)))


def usual_limit(task: Task, shape: Any) -> int:
    """The length limit where nobody says one: the task's own, or half of the model's context where that is less.

    shape   the model's configuration, of which `max_position_embeddings` is read
    """
    context = getattr(shape, "max_position_embeddings", None)
    return min(task.max_new_tokens, context // 2) if context else task.max_new_tokens
