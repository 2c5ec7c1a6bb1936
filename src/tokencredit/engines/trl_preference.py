"""The TRL engine for pairs: DPOTrainer with a weight per token.

The weighting is a chain of credit on rewards 1 and −1 (`tokencredit.preference`); what it reads is measured by the
reference, or stands in the rows. Pairs may be token ids, which is what pivotal tokens need: text is tokenized again,
and TRL ends each side of it with an end token. Models, PEFT, reference, collating and checkpoints stay TRL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tokencredit.engines.processes import refuse_strangers
from tokencredit.engines.trl_options import check_version, refuse_of_pairs

try:
    import trl

    check_version(trl.__version__, oldest="1.16")
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer import dpo_trainer
    from trl.trainer.utils import use_adapter
except ModuleNotFoundError as error:
    raise ImportError("the TRL engine needs trl and peft: pip install 'tokencredit[trl]'") from error

from accelerate.utils import is_peft_model

from tokencredit.engines.trl_pairs import WEIGHT, PairCollator, checked_pairs, has_ids, score_columns
from tokencredit.engines.trl_pairs import with_mean_weight_one as mean_one
from tokencredit.lm.models import CausalModel
from tokencredit.preference import PREFERENCES, Pairs, PreferenceMethod
from tokencredit.scores.table import FREE, UNMEASURED


class PreferenceTrainer(DPOTrainer):
    """A DPOTrainer that trains with any entry of PREFERENCES; everything else is TRL's.

        PreferenceTrainer(model="Qwen/Qwen2.5-0.5B", method="dpo_entropy", args=DPOConfig(...), train_dataset=pairs)

        m_p = β Σ_{i∈p} Σₜ cᵢₜ (log π_θ − log π_ref)ᵢₜ        L = mean over pairs of ω_p f(m_p)

    method         a name of PREFERENCES or a PreferenceMethod; β, link and the weights c are its own
    train_dataset  rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, which are trained on as they are, or what stock
                   TRL reads. A score x of the method stands in `chosen_x` and `rejected_x`, a number per token of ids;
                   `entropy` and `logprob` that no column holds are measured on the reference. A column `weight` is ω,
                   brought to mean one over the dataset

    With `dpo` it is stock TRL, step by step. ValueError where an option of TRL contradicts the method, where a score is
    missing, or where a chain compares pairs with each other, which micro-batches would change. Warns once where no
    token of a batch has weight.
    """

    args: DPOConfig

    def __init__(
        self,
        model: CausalModel | str,
        ref_model: CausalModel | None = None,
        args: DPOConfig | None = None,
        *,
        method: str | PreferenceMethod = "dpo",
        train_dataset=None,
        **keywords,
    ):
        self.method = PREFERENCES[method] if isinstance(method, str) else method
        if args is not None:
            refuse_of_pairs(args, self.method)
        if "group_local" not in self.method.chain.laws and "row_local" not in self.method.chain.laws:
            raise ValueError(
                f'method "{self.method.name}" weighs a pair by the pairs beside it, which micro-batches would change:'
                ' use method.replace(scope="group"), or "row"'
            )
        if keywords.get("data_collator") is not None:
            raise ValueError("leave data_collator out: scores and weights travel with the trainer's own")
        if train_dataset is None:
            raise ValueError("train_dataset is required: rows of prompt_ids, chosen_ids and rejected_ids")
        there = set(next(iter(train_dataset)))
        if images := there & {"image", "images"}:
            raise ValueError(f"pairs with {', '.join(images)}: PreferenceTrainer weighs tokens of text alone")
        self._columns = tuple(sorted(x for x in self.method.needs if set(score_columns([x])) <= there))
        self._measured = tuple(sorted(self.method.needs - set(self._columns)))
        if unknown := [name for name in self._measured if name not in FREE]:
            raise ValueError(_missing(self.method, unknown))
        if args is not None and args.sync_ref_model and self._measured:
            raise ValueError(
                f"sync_ref_model=True moves the reference, and with it the {', '.join(self._measured)} that"
                f" {self.method.name} weighs by: leave it off, or measure once, into {_told(self._measured)}"
            )
        self._silent = False
        with _reference_entropy() if "entropy" in self._measured else nullcontext():
            super().__init__(model, ref_model, args, train_dataset=train_dataset, **keywords)
        refuse_strangers(self)
        own = self.data_collator
        self.data_collator = PairCollator(
            own.pad_token_id, own.max_length, own.truncation_mode, own.pad_to_multiple_of, scores=self._columns
        )
        self.beta = self.method.beta
        if self.method.reference_free and not self._measured and not self.args.sync_ref_model:
            self.ref_model = None

    # --- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first = next(iter(dataset))
        if absent := [name for name in score_columns(self._columns) if name not in first]:
            raise ValueError(f"the {dataset_name} dataset lacks {', '.join(absent)}, which the training rows have")
        if has_ids(first):
            dataset = checked_pairs(dataset, self._columns, args.max_length)
        elif self._columns:
            raise ValueError(
                f"{_told(self._columns)} are per token of ids: give prompt_ids, chosen_ids and rejected_ids with them,"
                " not text, which is tokenized again"
            )
        else:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return mean_one(dataset) if WEIGHT in first else dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *score_columns(self._columns), WEIGHT]

    # --- update time --------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: CausalModel, inputs: dict[str, Tensor], return_outputs: bool):
        mask = inputs["completion_mask"][:, 1:].bool()
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**rows, **routers, labels=labels, fused_lm_head=True)
        pairs, reference = self._pairs(inputs, rows, labels, mask)
        # Prompt adapters put virtual tokens first; the real ones are the last.
        logprob = outputs.log_probs[:, -mask.shape[1] :]
        credit = self.method.credit(pairs)
        loss, _ = self.method.loss(
            logprob=logprob, ref_logprob=reference, credit=credit, pairs=pairs, total=float(len(pairs))
        )
        self._look(credit)
        self._log_pairs(outputs, logprob.detach(), reference, credit, pairs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._log_mean("aux_loss", outputs.aux_loss.detach(), 1)
        if self.model.training:
            self._total_train_tokens += int(self._sum(rows["attention_mask"].sum())) // self._tp_size
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**rows)

    def _pairs(self, inputs, rows, labels: Tensor, mask: Tensor) -> tuple[Pairs, Tensor | None]:
        """The batch as pairs, with the scores that the method reads; the reference's log-probs [2P, L − 1], or None
        where nobody asks for them.
        """
        scores = {name: inputs[f"score_{name}"][:, 1:] for name in self._columns}
        logprob = None
        if self._measured or not self.method.reference_free:
            found = self._reference(rows, labels)
            logprob = found.log_probs[:, -mask.shape[1] :]
            measured = {"logprob": found.log_probs, "entropy": found.entropy}
            scores |= {name: measured[name][:, -mask.shape[1] :] for name in self._measured}
        return Pairs(mask, {name: score.float() for name, score in scores.items()}, inputs.get(WEIGHT)), logprob

    def _reference(self, rows: dict[str, Any], labels: Tensor) -> Any:
        """The reference's outputs: the model's own without its adapter, or with its first one, under PEFT."""
        given = rows | {"labels": labels, "fused_lm_head": True}
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if not (is_peft_model(self.model) and self.ref_model is None):
                return self.ref_model(**given)
            own = self.accelerator.unwrap_model(self.model)
            with use_adapter(own, adapter_name="ref" if "ref" in own.peft_config else None):
                return self.model(**given)

    # --- what is told -------------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sum(self, x: Tensor) -> float:
        """Over all processes."""
        return float(self.accelerator.reduce(x.detach().double(), "sum"))

    def _log_mean(self, name: str, total: Tensor, num: Tensor | int) -> None:
        """Logs total / num, each summed over all processes; 0 of nothing."""
        sums = torch.stack([torch.as_tensor(x, device=self.accelerator.device).double() for x in (total, num)])
        found, count = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics[self._mode][name].append(found / count if count else 0.0)

    def _log_pairs(self, outputs, logprob: Tensor, reference: Tensor | None, credit: Tensor, pairs: Pairs) -> None:
        """TRL's figures under TRL's names, rewards with the weights; and the share of tokens that have weight."""
        mask, num, width = pairs.mask, len(pairs), pairs.mask.shape[1]
        gap = logprob if reference is None or self.method.reference_free else logprob - reference
        reward = (self.method.beta * (credit * gap).sum(1)).split(num)
        margin = reward[0] + reward[1]
        self._log_mean("entropy", outputs.entropy.detach()[:, -width:][mask].sum(), mask.sum())
        self._log_mean("credited_share", (credit != 0).sum(), mask.sum())
        top = outputs.is_top1[:num, -width:] & mask[:num]
        self._log_mean("mean_token_accuracy", top.sum(), mask[:num].sum())
        logits = outputs.mean_logits.detach()[:, -width:]
        sides = zip(("chosen", "rejected"), (reward[0], -reward[1]), *(x.split(num) for x in (logprob, logits, mask)))
        for side, own, chance, logit, tokens in sides:
            self._log_mean(f"rewards/{side}", own.sum(), num)
            self._log_mean(f"logps/{side}", chance.sum(), num)
            self._log_mean(f"logits/{side}", logit[tokens].sum(), tokens.sum())
        self._log_mean("rewards/accuracies", (margin > 0).sum(), num)
        self._log_mean("rewards/margins", margin.sum(), num)

    def _look(self, credit: Tensor) -> None:
        if self._silent or credit.any() or not self.accelerator.is_main_process:
            return
        self._silent = True
        warnings.warn(
            f"no token of a batch of {len(credit) // 2} pairs has weight under {self.method.name}: the batch trains"
            f" nothing. Look at {_told(self._columns or self._measured)}",
            stacklevel=2,
        )


@contextmanager
def _reference_entropy() -> Iterator[None]:
    """Inside, TRL's fused heads give entropies as well: the reference's gives log-probs alone."""
    plain = dpo_trainer.add_fused_lm_head

    @wraps(plain)
    def with_entropy(model: CausalModel, *args, outputs=("log_probs",), **more):
        plain(model, *args, outputs=tuple(dict.fromkeys((*outputs, "entropy"))), **more)

    dpo_trainer.add_fused_lm_head = with_entropy
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = plain


def _told(names: tuple[str, ...]) -> str:
    return ", ".join(score_columns(names))


def _missing(method: PreferenceMethod, names: list[str]) -> str:
    what = "".join(f"\n{name}: {UNMEASURED[name].what}" for name in names if name in UNMEASURED)
    return (
        f'method "{method.name}" needs the scores {", ".join(names)}; the reference gives'
        f" {', '.join(sorted(FREE))}. Give the others per token: columns {_told(tuple(names))}" + what
    )
