"""FORMATS: what a trainer's log looks like, and who reads a row of it. One entry per layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokencredit.logs import readers, trainers
from tokencredit.logs.files import LogRow, Place
from tokencredit.logs.rollout import LoggedRollout


@dataclass(frozen=True)
class Format:
    """The layout of a log.

    what    one line for tables and messages
    needs   columns by which it is told; `a|b` where either will do
    read    a row and its place -> a rollout, or those of the row
    again   whether a file (the second) holds the rollouts of the one before it once more
    sums    whether the reward is the sum of several columns, for want of weights
    source  the code that writes it
    """

    name: str
    what: str
    needs: tuple[str, ...]
    read: Callable[[LogRow, Place], LoggedRollout | list[LoggedRollout]]
    source: str
    again: Callable[[Path, Path], bool] | None = None
    sums: bool = False

    def missing(self, columns: Iterable[str]) -> list[str]:
        """What of `needs` is not among the columns."""
        there = set(columns)
        return [need for need in self.needs if not there & set(need.split("|"))]


_IDS = "|".join(readers.SYNONYMS["completion_ids"])
_PROMPT_IDS = "|".join(readers.SYNONYMS["prompt_ids"])
FORMATS = {
    each.name: each
    for each in (
        Format(
            "verl",
            "verl's trainer.rollout_data_dir and validation_data_dir: STEP.jsonl",
            ("input", "output", "score", "step"),
            trainers.read_verl,
            "volcengine/verl at 00401103, verl/trainer/ppo/ray_trainer.py: _dump_generations",
        ),
        Format(
            "run",
            "our run directories: tokens/step_*.parquet",
            ("step", "group", "prompt", "completion", "reward", "success", "token_ids", "tokens"),
            trainers.read_run,
            "tokencredit, runs.py: token_table",
        ),
        Format(
            "pivotality",
            "our pivotality runs: traces.parquet beside tokens.parquet",
            ("trace", "digest", "row", "prompt_ids", "completion_ids", "reward"),
            trainers.read_pivotality,
            "tokencredit, pivotality/record.py: write",
        ),
        Format(
            "trl",
            "TRL's log_completions: completions/completions_STEP.parquet",
            ("step", "prompt", "completion", "advantage"),
            trainers.read_trl,
            "huggingface/trl 1.16.0, trl/trainer/grpo_trainer.py: GRPOTrainer.log",
            trainers.same_table,
            sums=True,
        ),
        Format(
            "prime-rl-tokens",
            "prime-rl's token exports: token_exports/step_N/rank_R.jsonl",
            ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs", "step"),
            trainers.read_prime_tokens,
            "PrimeIntellect-ai/prime-rl at 004274ec, src/prime_rl/trainer/rl/token_export.py: TokenExporter",
        ),
        Format(
            "prime-rl-rollouts",
            "prime-rl's saved rollouts: rollouts/step_N/train_rollouts.jsonl",
            ("example_id", "prompt", "completion", "reward", "is_truncated"),
            trainers.read_prime_rollout,
            "PrimeIntellect-ai/verifiers at 00d83204, verifiers/utils/save_utils.py: state_to_output",
        ),
        Format(
            "prime-rl-traces",
            "prime-rl's traces: traces/step_N/train/traces.jsonl, with annotations/ beside it",
            ("nodes|traces",),
            trainers.read_prime_traces,
            "PrimeIntellect-ai/prime-rl at 0b77f237, src/prime_rl/monitors/file.py: FileMonitor; verifiers at 0184474,"
            " verifiers/v1/graph.py: MessageNode",
        ),
        Format(
            "open-instruct",
            "open-instruct's --save_traces: RUN_rollouts_SHARD.jsonl",
            ("step", "prompt_idx", "prompt_tokens", "response_tokens", "reward", "advantage", "finish_reason"),
            trainers.read_open_instruct,
            "allenai/open-instruct at 00feb3a5, open_instruct/rl_utils.py: RolloutRecord",
        ),
        Format("text", "prompt and completion, as text or messages", ("prompt", "completion"), readers.read_text, ""),
        Format("chat", "messages of prompt and completion", ("messages",), readers.read_chat, ""),
        Format("ids", "token ids of prompt and completion", (_PROMPT_IDS, _IDS), readers.read_ids, ""),
    )
}
"""In the order in which they are tried."""


def format_of(columns: Iterable[str], where: str) -> Format:
    """The format that has these columns. ValueError says which came nearest and what it lacks."""
    columns = list(columns)
    for each in FORMATS.values():
        if not each.missing(columns):
            return each
    lack = {each: len(each.missing(columns)) / len(each.needs) for each in FORMATS.values()}
    nearest = min(lack, key=lambda each: (lack[each], each.name != "text"))
    raise ValueError(
        f"{where} fits no format. Nearest is {nearest.name} ({nearest.what}), but there is no column"
        f" {' and no '.join(nearest.missing(columns))}; there are: {', '.join(columns) or 'none'}. Say which column is"
        ' which, as in columns={"reward": "score"} or --column reward=score'
    )
