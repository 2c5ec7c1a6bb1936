"""The TRL engine: GRPOTrainer with per-token credit.

At rollout time the credit of whole groups, gathered across processes, is computed from the policy that sampled; it travels with the
batch through TRL's shuffling and splitting. The loss is the method's own. Only wrappers around TRL's hooks, so that TRL's users
keep PEFT, vLLM, DeepSpeed and FSDP through accelerate, callbacks and checkpoints.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("the TRL engine needs trl and peft: pip install 'tokencredit[trl]'") from error

from tokencredit.engines.trl_groups import Batch, draw_again
from tokencredit.engines.trl_options import refuse_what_conflicts
from tokencredit.masked import zero_off
from tokencredit.methods import METHODS, Method, Plan
from tokencredit.objective.surrogates import token_mean

FREE = ("entropy", "logprob")
PHASES = ("generation", "scoring", "update")
EXTRAS = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
          "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip


class CreditTrainer(GRPOTrainer):
    """A GRPOTrainer that trains with any `Method`; everything else is TRL's.

        CreditTrainer(model="Qwen/Qwen2.5-0.5B", method="gtpo", reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts)

    method         a name of METHODS or a Method; every `max_length` it leaves open becomes args.max_completion_length
    success_above  a rollout is a success when its total reward exceeds this
    scorers        {score name: function(trainer, inputs, batch) -> [B, T]} for scores that a forward pass does not give
                   (`entropy` and `logprob` it does); inputs are the dataset rows, batch TRL's tensors of this process
    max_rounds     generation rounds in which dynamic sampling collects groups with both outcomes, for methods that ask for it
    record         function(dict) called on the main process after every rollout batch with the batch's texts, tokens, scores and credit
    record_every   ... at every so many optimizer steps

    Raises ValueError where an option of TRL contradicts the method, or where a score is needed that nobody gives.
    """

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: GRPOConfig | None = None,
        *positional,
        method: str | Method = "grpo",
        success_above: float = 0.0,
        scorers: Mapping[str, Callable] | None = None,
        max_rounds: int = 4,
        record: Callable[[dict], None] | None = None,
        record_every: int = 10,
        **keywords,
    ):
        method = METHODS[method] if isinstance(method, str) else method
        self.scorers = dict(scorers or {})
        missing = sorted(method.needs - set(FREE) - set(self.scorers))
        if missing:
            raise ValueError(
                f'method "{method.name}" needs the scores {", ".join(missing)}; a forward pass gives {", ".join(FREE)}. '
                f"Give the others: CreditTrainer(..., scorers={{{missing[0]!r}: function(trainer, inputs, batch) -> [B, T]}})"
            )
        if args is not None:
            refuse_what_conflicts(args, method)
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) or reward_funcs is None else [reward_funcs]
        if functions is not None:
            functions = [_checked(f) for f in functions]
        super().__init__(model, functions, args, *positional, **keywords)
        self.method = method.within(self.max_completion_length)
        self.success_above, self.max_rounds = success_above, max_rounds
        self.record, self.record_every = record, record_every
        self._stash: dict[str, Tensor] | None = None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._figures: dict[str, float] = {}
        if self.method.mixed_groups_only and max_rounds > 1 and not hasattr(self.train_dataset, "__len__"):
            raise ValueError("dynamic sampling draws further prompts and needs a dataset with a length: load it whole, or max_rounds=1")

    # --- rollout time -----------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        began, generated = time.perf_counter(), self._seconds["generation"]
        out, batch = self._roll_out(inputs)
        if self.model.training and self.method.mixed_groups_only and self.max_rounds > 1:
            out, batch = draw_again(self, out, batch)
        credit, plan = self._assign(batch)
        local = slice(self.accelerator.process_index * len(out["prompt_ids"]), None)
        width = out["completion_ids"].shape[1]
        out["advantages"] = credit[local][: len(out["prompt_ids"]), :width]
        out["token_weight"] = plan.weight[local][: len(out["prompt_ids"]), :width]
        if plan.selected is not None:
            out["selected"] = plan.selected[local][: len(out["prompt_ids"]), :width]
        if "entropy" in batch.scores:
            out["entropy_known"] = torch.ones(len(out["prompt_ids"]), dtype=torch.bool)
        self._log_rollouts(batch, credit)
        self._seconds["scoring"] += time.perf_counter() - began - (self._seconds["generation"] - generated)
        return out

    def _roll_out(self, inputs):
        """One generation round: TRL's local tensors, and the gathered batch in group order."""
        self._stash = {}
        try:
            out = super()._generate_and_score_completions(inputs)
            stash = self._stash
        finally:
            self._stash = None
        wanted = self.method.needs | ({"logprob"} if self.method.surrogate.selects else set())
        if (wanted & set(FREE) or self._recording()) and "entropy" not in stash:
            with torch.no_grad(), _timed(self._seconds, "extra_forward"):
                stash["logprob"], stash["entropy"], _ = self._logprobs(self.model, out, self.args.per_device_train_batch_size)
        for name in sorted(self.scorers.keys() & self.method.needs):
            with _timed(self._seconds, name):
                stash[name] = self.scorers[name](self, inputs, out)
        mode_group = self.num_generations if self.model.training else self.num_generations_eval
        return out, Batch.gather(self, inputs, out, stash, mode_group)

    def _assign(self, batch: Batch) -> tuple[Tensor, Plan]:
        """Credit and plan of the whole gathered batch; the same on every process."""
        rollouts = batch.rollouts(self.success_above)
        credit = self.method.credit(rollouts)
        logprob = batch.scores.get("logprob", torch.zeros_like(credit))
        return credit, self.method.plan(logprob=logprob, old_logprob=logprob, credit=credit, rollouts=rollouts)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """Keeps the entropies of the forward pass that TRL does for the old log-probs anyway."""
        scoring = self._stash is not None and not torch.is_grad_enabled() and model is self.model
        # With PEFT the reference pass runs through the same model: only the first pass is the old policy's, where TRL does one at all.
        if not scoring or "entropy" in self._stash or not self._scores_old_policy():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        wanted = kwargs.pop("compute_entropy", False)
        logprob, entropy, *rest = super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=True, **kwargs)
        self._stash |= {"logprob": logprob, "entropy": entropy}
        return logprob, entropy if wanted else None, *rest

    def _scores_old_policy(self) -> bool:
        every = self.args.steps_per_generation * self.num_iterations
        corrected = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        return self.args.gradient_accumulation_steps % every != 0 or corrected

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self._stash is not None:
            self._stash["rewards_per_func"] = rewards
        return rewards

    def _generate(self, prompts):
        with _timed(self._seconds, "generation"):
            generated = super()._generate(prompts)
        if self._stash is not None:
            self._stash["texts"] = generated[3]
        return generated

    # --- update time ------------------------------------------------------------------------------------------------------------

    def _logprobs(self, model, inputs, batch_size=None):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        extras = {k: inputs[k] for k in EXTRAS if inputs.get(k) is not None}
        if getattr(self, "aux_loss_enabled", False) and torch.is_grad_enabled():
            extras["compute_aux_loss"] = True
        found = GRPOTrainer._get_per_token_logps_and_entropies(
            self, model, ids, attention, inputs["completion_ids"].shape[1], batch_size, compute_entropy=True, **extras
        )
        return found if len(found) == 3 else (*found, None)

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        whole, rows = inputs, self._credited_rows(inputs)
        inputs = _trimmed(inputs, rows)
        mask, credit = _loss_mask(inputs), inputs["advantages"]
        logprob, entropy, aux_loss = self._logprobs(model, inputs)
        old = inputs.get("old_per_token_logps")
        old = logprob.detach() if old is None else old
        loss, stats = self.method.surrogate(logprob, old, credit, mask, inputs.get("selected"))
        if "importance_sampling_ratio" in inputs:
            loss = loss * inputs["importance_sampling_ratio"]
        if self.beta != 0.0:
            loss = loss + self.beta * self._kl(logprob, old, inputs["ref_per_token_logps"], mask)
        # The weights are those of the whole rollout batch; an optimizer step sees accumulation/steps_per_generation of it, and
        # distributed training averages over processes where the weights call for a sum.
        loss = (inputs["token_weight"] * zero_off(loss, mask)).sum() * self.accelerator.num_processes
        if mode == "train":
            loss = loss * self.args.steps_per_generation / self.current_gradient_accumulation_steps
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)
        if "entropy_known" not in whole:
            stats["entropy"] = self._mean_entropy(model, whole, rows, zero_off(entropy.detach(), mask))
        self._log_update(mode, stats, mask.sum() / _loss_mask(whole).sum().clamp(min=1))
        return loss

    def _mean_entropy(self, model, inputs, rows, entropy):
        """Mean token entropy of all rows, from the entropies of the credited ones and a forward pass over the others."""
        total = entropy.sum()
        if not rows.all():
            others = _trimmed(inputs, ~rows)
            with torch.no_grad():
                total = total + zero_off(self._logprobs(model, others)[1], _loss_mask(others)).sum()
        return total / _loss_mask(inputs).sum().clamp(min=1)

    def _kl(self, logprob, old, ref, mask):
        """k3 against the reference, times the ratio where TRL's bias correction is on."""
        gap = zero_off(ref - logprob, mask)
        kl = gap.exp() - gap - 1
        self._metrics["train" if self.model.training else "eval"]["kl"].append(token_mean(kl, mask).item())
        return kl * zero_off(logprob - old, mask).exp() if getattr(self.args, "use_bias_correction_kl", False) else kl

    def _credited_rows(self, inputs) -> Tensor:
        """[b] bool: the rows of a micro-batch that carry a gradient. The others cost time and change nothing; at least one is kept."""
        rows = (inputs["advantages"] != 0).any(1)
        if "selected" in inputs:
            rows = rows | inputs["selected"].any(1)
        regularised = self.beta != 0.0 or getattr(self, "aux_loss_enabled", False)
        unmeasured = self.accelerator.num_processes > 1 and "entropy_known" not in inputs
        if not self.model.training or regularised or unmeasured or any(inputs.get(k) is not None for k in EXTRAS):
            return torch.ones_like(rows)
        if not rows.any():
            rows[0] = True  # every process takes part in every backward pass
        return rows

    def training_step(self, *args, **kwargs):
        began, before = time.perf_counter(), self._seconds["generation"] + self._seconds["scoring"]
        loss = super().training_step(*args, **kwargs)
        self._seconds["update"] += time.perf_counter() - began - (self._seconds["generation"] + self._seconds["scoring"] - before)
        return loss

    # --- what is logged ---------------------------------------------------------------------------------------------------------

    def _recording(self) -> bool:
        return self.record is not None and self.model.training and (self.state.global_step % self.record_every == 0)

    def _log_rollouts(self, batch: Batch, credit: Tensor) -> None:
        rollouts = batch.rollouts(self.success_above)
        mode = "train" if self.model.training else "eval"
        log = self._metrics[mode]
        against = ((credit * torch.where(rollouts.success, 1, -1)[:, None]) < 0)[credit != 0].float()
        size = credit.abs().sum()
        figures = {
            "pass_rate": rollouts.success.float().mean(),
            "length": rollouts.length.float().mean(),
            "truncated": batch.truncated.float().mean(),
            "zero_variance_groups": (~rollouts.informative).float().mean(),
            "credit_against_outcome": against.mean() if against.numel() else torch.zeros(()),
            "credited_tokens": size.square() / credit.square().sum() if size > 0 else torch.zeros(()),
            "credit_mean": credit[rollouts.mask].mean() if rollouts.mask.any() else torch.zeros(()),
            "credit_std": credit[rollouts.mask].std() if rollouts.mask.sum() > 1 else torch.zeros(()),
        }
        if "entropy" in batch.scores:
            figures["entropy"] = token_mean(batch.scores["entropy"], rollouts.mask)
        self._figures = {name: float(value) for name, value in figures.items()} if mode == "train" else self._figures
        for name, value in figures.items():
            log[name].append(float(value))
        log["rollout_tokens"].append(float(rollouts.length.sum()) * batch.rounds)
        if self.log_completions:
            batch.rewrite_table(self._logs, self.reward_func_names, credit.sum(1) / rollouts.length.clamp(min=1))
        if self._recording() and self.accelerator.is_main_process:
            self.record(batch.record(self, rollouts, credit))

    def _log_update(self, mode: str, stats: dict[str, Tensor], share: Tensor) -> None:
        """Means over the tokens of rollouts that carry credit; clip fractions are shares of all tokens."""
        names = sorted(stats)
        values = torch.stack([stats[n].float() * (share if n.startswith("clip") else 1) for n in names])
        for name, value in zip(names, self.accelerator.reduce(values, "mean").tolist()):
            self._metrics[mode][name].append(value)
        self._metrics[mode]["credited_share"].append(float(share))

    def log(self, logs, start_time=None):
        """Adds seconds by phase and tokens per second since the last log, and at steps that reuse rollouts the rollouts' figures."""
        total = sum(self._seconds[p] for p in PHASES)
        tokens = self._metrics["train"].pop("rollout_tokens", [])
        if self.model.training and total > 0:
            logs |= {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
            logs["tokens_per_second"] = sum(tokens) / total
            logs |= {name: value for name, value in self._figures.items() if name not in self._metrics["train"]}
            self._seconds.update(dict.fromkeys(self._seconds, 0.0))
        super().log(logs, start_time)


def _trimmed(inputs, rows: Tensor):
    """These rows of a micro-batch, cut to their longest prompt and completion."""
    if rows.all():
        return inputs
    width = inputs["completion_ids"].shape[1]
    kept = {k: v[rows] if torch.is_tensor(v) and v.dim() and len(v) == len(rows) else v for k, v in inputs.items()}
    longest = max(int(kept["completion_mask"].sum(1).max()), 1)
    padding = kept["prompt_mask"].shape[1] - max(int(kept["prompt_mask"].sum(1).max()), 1)
    for name, value in kept.items():
        if name in ("prompt_ids", "prompt_mask"):
            kept[name] = value[:, padding:]
        elif torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width:
            kept[name] = value[:, :longest]
    return kept


def _loss_mask(inputs) -> Tensor:
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def _checked(function):
    """A reward function whose numbers are checked: how many they are and that each is finite. None, as in TRL, means not applicable."""
    if not callable(function) or isinstance(function, torch.nn.Module) or inspect.iscoroutinefunction(function):
        return function

    def reward(prompts, completions, **columns):
        rewards = function(prompts=prompts, completions=completions, **columns)
        rewards = rewards.tolist() if isinstance(rewards, Tensor) else list(rewards)
        if len(rewards) != len(completions):
            raise ValueError(f"reward function {name} returned {len(rewards)} rewards for {len(completions)} completions, not one for each")
        for row, value in enumerate(rewards):
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"reward function {name} returned {value} for completion {row}: {str(completions[row])[:200]!r}. "
                    "Rewards must be finite; None means that the function does not apply"
                )
        return rewards

    name = getattr(function, "__name__", type(function).__name__)
    reward.__name__ = name
    return reward


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
