"""The TRL engine: GRPOTrainer with per-token credit.

At rollout time the credit of whole groups, gathered across processes, is computed from the policy that sampled; it
travels with the batch through TRL's shuffling and splitting. The loss is the method's own. Only wrappers around TRL's
hooks, so that TRL's users keep PEFT, vLLM, DeepSpeed and FSDP through accelerate, callbacks and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from tokencredit.engines.trl_options import check_version, refuse_what_conflicts

try:
    import peft  # noqa: F401
    import trl

    check_version(trl.__version__)
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
except ModuleNotFoundError as error:
    raise ImportError("the TRL engine needs trl and peft: pip install 'tokencredit[trl]'") from error

from accelerate.utils import gather_object

from tokencredit.engines.processes import refuse_parts, refuse_strangers
from tokencredit.engines.scorers import Scorer, importance_scorers, js_divergence, planning, uniform
from tokencredit.engines.trl_entropy import EntropyProbe
from tokencredit.engines.trl_figures import Clock, as_trl, rollout_figures, update_figures
from tokencredit.engines.trl_generation import Listener, in_parts
from tokencredit.engines.trl_groups import (
    GatheredBatch,
    Stash,
    draw_again,
    extend_table,
    loss_mask,
    rewrite_table,
    share,
    token_columns,
    trimmed,
)
from tokencredit.engines.trl_noise import NoiseProbe
from tokencredit.engines.trl_past import PassRates, Remembers
from tokencredit.engines.trl_rewards import check_token_rewards, checked
from tokencredit.engines.trl_scoring import Scoring, checked_scoring, without_dropout
from tokencredit.engines.trl_silence import Silence, without_filler
from tokencredit.engines.trl_steering import Steered
from tokencredit.lm.models import CausalModel
from tokencredit.masked import over, zero_off
from tokencredit.methods import METHODS, Method, Plan
from tokencredit.objective.surrogates import token_mean
from tokencredit.rollouts import TOKEN_REWARD
from tokencredit.scores.table import FREE, UNMEASURED

EXTRAS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


GIVEN: Mapping[str, Scorer] = {"uniform": uniform, "js_divergence": js_divergence, "planning": planning()}
"""Scores besides the importance proxies that need nothing but the batch."""


class CreditTrainer(Steered, Remembers, GRPOTrainer):
    """A GRPOTrainer that trains with any `Method`; everything else is TRL's.

        CreditTrainer(model="Qwen/Qwen2.5-0.5B", method="gtpo", reward_funcs=reward, args=GRPOConfig(...),
        train_dataset=prompts)

    method         a name of METHODS or a Method; every `max_length` it leaves open becomes args.max_completion_length
    success_above  a rollout is a success when its total reward exceeds this
    scorers        {score name: function(trainer, inputs, batch) -> [B, T]} for scores that neither a forward pass gives
                   (`entropy` and `logprob`) nor `engines.scorers`; inputs are the dataset rows, batch TRL's tensors of
                   this process
    token_rewards  function of a reward function's arguments that gives each completion None, or a list of rewards: one
                   per token or one per turn, None where there is none, which is not a reward of 0. They are the score
                   `token_reward`
    max_rounds     generation rounds in which dynamic sampling collects groups with both outcomes, for methods that ask
                   for it; groups that are still without both then get no credit. 1: no dynamic sampling
    record         function(dict) called on the main process after a rollout batch with the batch's texts, tokens,
                   scores and credit
    record_every   ... for the first rollout batch of every so many optimizer steps
    noise_scale_every  optimizer steps between measurements of the gradient noise scale, in prompts (0: none); see
                       engines.trl_noise
    entropy_change_every   optimizer steps between measurements of what a step does to the mean token entropy, predicted
                       and realised (0: none); see engines.trl_entropy
    generation_rows   completions that transformers writes together on a process, at most; None: all of a rollout batch
    memory         bytes that a process may take while it measures scores, as `lm.room.beside_training` takes them

    Raises ValueError where an option of TRL contradicts the method, where a score is needed that nobody gives or that
    needs parameters which are sharded, and where the processes of a launcher do not train together. Warns
    once where rewards differ within groups and no token of a batch has credit, with the reason (`silence`).
    """

    args: GRPOConfig

    def __init__(
        self,
        model: CausalModel | str,
        reward_funcs=None,
        args: GRPOConfig | None = None,
        *positional,
        method: str | Method = "grpo",
        success_above: float = 0.0,
        scorers: Mapping[str, Callable] | None = None,
        token_rewards: Callable | None = None,
        max_rounds: int = 4,
        record: Callable[[dict], None] | None = None,
        record_every: int = 10,
        noise_scale_every: int = 0,
        entropy_change_every: int = 0,
        generation_rows: int | None = None,
        memory: int | None = None,
        **keywords,
    ):
        method = METHODS[method] if isinstance(method, str) else method
        self.scorers = {**importance_scorers(), **GIVEN, "past_pass_rate": PassRates(), **(scorers or {})}
        self.token_rewards = token_rewards
        missing = sorted(method.needs - FREE - set(self.scorers) - ({TOKEN_REWARD} if token_rewards else set()))
        if missing:
            raise ValueError(
                f'method "{method.name}" needs the scores {", ".join(missing)}; a forward pass gives'
                f" {', '.join(sorted(FREE))}. Give the others: CreditTrainer(..., scorers={{{missing[0]!r}:"
                " function(trainer, inputs, batch) -> [B, T]})"
                + (", or token_rewards=function(prompts, completions, ...)" if TOKEN_REWARD in missing else "")
                + "".join(f"\n{name}: {UNMEASURED[name].what}" for name in missing if name in UNMEASURED)
            )
        positive = {"max_rounds": max_rounds, "record_every": record_every, "generation_rows": generation_rows}
        for name, number in positive.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if args is not None:
            refuse_what_conflicts(args, method)
        super().__init__(
            model,
            list(reward_funcs) if isinstance(reward_funcs, tuple) else reward_funcs,
            args,
            *positional,
            **keywords,
        )
        if method.mixed_groups_only and max_rounds > 1 and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                "dynamic sampling draws further prompts and needs a dataset with a length: load it whole, or"
                " max_rounds=1"
            )
        refuse_strangers(self)
        refuse_parts(self, method, self.scorers)
        self.reward_funcs = [
            checked(function, name) for function, name in zip(self.reward_funcs, self.reward_func_names)
        ]
        self.method = self._start = method.within(self.max_completion_length)
        self._noise = NoiseProbe(noise_scale_every, self)
        self._entropy = EntropyProbe(entropy_change_every, self)
        self.success_above, self.max_rounds, self.generation_rows = success_above, max_rounds, generation_rows
        self.memory = memory
        self._leaves_filler = method.mixed_groups_only and max_rounds > 1
        self._silence = Silence(self.accelerator.is_main_process)
        self.record, self.record_every, self._recorded = record, record_every, None
        self._stash: Stash | None = None
        self._scoring: Scoring | None = None
        self._listener = Listener(self)
        self._with_text = False
        self._figures: dict[str, float] = {}
        self.sampled_besides = {"rollouts": 0, "tokens": 0}
        self.latest_rewards: Tensor | None = None
        self._token_columns: dict[str, list] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._clock = Clock()
        self.add_callback(self._clock)
        self.add_callback(self._entropy)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(self)
        # Every process takes part in gathering what is recorded, also where only the main process was given `record`.
        self._records = any(gather_object([self.record is not None]))

    # --- rollout time -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with self._clock.phase("scoring"):
            self._with_text = self._recording()
            out, batch = self._roll_out(inputs)
            if self.model.training and self.method.mixed_groups_only and self.max_rounds > 1:
                out, batch = draw_again(self, out, batch)
            credit, plan = self._assign(batch)
            width, mine = out["completion_ids"].shape[1], share(self, len(credit))
            out["advantages"] = credit[mine, :width]
            out["token_weight"] = plan.weight[mine, :width]
            if plan.coefficient is not None:
                out["coefficient"] = plan.coefficient[mine, :width]
            if "entropy" in batch.scores:
                out["entropy_known"] = torch.ones(())
            if self._noise.every and self.model.training:
                out["group"] = batch.group[mine]
            self._log_rollouts(batch, credit)
            if self.model.training:
                self._steer(batch.rollouts)
        return out

    def _roll_out(self, inputs):
        """One generation round: TRL's local tensors, and the gathered batch in group order."""
        if self._scoring is None:
            self._scoring = checked_scoring(self)
        self._stash = Stash()
        try:
            out = super()._generate_and_score_completions(inputs)
        finally:
            stash, self._stash = self._stash, None
        self.latest_rewards = stash.rewards
        if self._reads_policy() and "entropy" not in stash.scores:
            stash.scores |= self._listener.scores(out, lambda: self._policy_scores(out))
        for name in sorted(self.scorers.keys() & self.method.needs):
            score = self.scorers[name](self, inputs, out)
            if score.shape != out["completion_ids"].shape:
                shape = list(out["completion_ids"].shape)
                raise ValueError(f'the scorer of "{name}" must return [B, T] = {shape}, got shape {list(score.shape)}')
            stash.scores[name] = score
        if stash.token_rewards is not None:
            stash.scores[TOKEN_REWARD] = check_token_rewards(
                stash.token_rewards, stash.completion_ids, loss_mask(out), "token_rewards"
            )
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        return out, GatheredBatch.gather(self, inputs, out, stash, group_size, self._with_text)

    def _reads_policy(self) -> bool:
        """Whether log-probs or entropies of the policy that sampled are read, by the method or into the record."""
        wanted = self.method.needs | ({"logprob"} if self.method.surrogate.plans else set())
        return bool(wanted & FREE - self.scorers.keys()) or self._with_text

    def _policy_scores(self, out) -> dict[str, Tensor]:
        """Both [B, T], from a forward pass of their own."""
        args = self.args
        with self._measuring():
            chunk = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
            logprob, entropy, _ = self._logprobs(self.model, out, chunk)
        return {"logprob": logprob, "entropy": entropy}

    def _assign(self, batch: GatheredBatch) -> tuple[Tensor, Plan]:
        """Credit and plan of the whole gathered batch; the same on every process."""
        rollouts = batch.rollouts
        credit = given = self.method.credit(rollouts)
        filtered = self.model.training and self._leaves_filler
        if filtered:
            credit = zero_off(given, rollouts.mixed[:, None].expand_as(given))
        if self.model.training:
            self._silence.look(self.method, batch, given, credit)
        logprob = batch.scores.get("logprob", torch.zeros_like(credit))
        plan = self.method.plan(logprob=logprob, old_logprob=logprob, credit=credit, rollouts=rollouts)
        return credit, without_filler(plan, rollouts) if filtered else plan

    def _get_per_token_logps_and_entropies(self, model: CausalModel, *args, **kwargs):
        """Keeps the entropies of the forward pass that TRL does for the old log-probs anyway; without a gradient also
        without dropout.
        """
        scoring = self._scoring or Scoring()
        if torch.is_grad_enabled():
            return self._scored(scoring, model, *args, **kwargs)
        # With PEFT the reference pass runs through the same model: only the first pass is the old policy's, where TRL
        # does one at all.
        kept = self._stash is not None and model is self.model and self._scores_old_policy()
        kept = kept and "entropy" not in self._stash.scores
        wanted = kwargs.pop("compute_entropy", False)
        with without_dropout(model):
            found = self._scored(scoring, model, *args, compute_entropy=wanted or kept, **kwargs)
        logprob, entropy, *rest = found
        if kept:
            self._stash.scores |= {"logprob": logprob, "entropy": entropy}
        return logprob, entropy if wanted else None, *rest

    def _scored(self, scoring: Scoring, model: CausalModel, *args, **kwargs):
        """TRL's (log-probs, entropies, ...) of completions, the way that `trl_scoring` has found right."""
        return super()._get_per_token_logps_and_entropies(scoring.of(model, self.temperature), *args, **kwargs)

    def _scores_old_policy(self) -> bool:
        """Whether TRL computes old log-probs: its rollouts outlive an optimizer step, or vLLM's are corrected."""
        every = self.args.steps_per_generation * self.num_iterations
        corrected = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        return self.args.gradient_accumulation_steps % every != 0 or corrected

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list, *args, **kwargs):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list, *args, **kwargs)
        if self._stash is not None:
            self._stash.rewards, self._stash.completions, self._stash.completion_ids = (
                rewards,
                completions,
                completion_ids_list,
            )
            if self.token_rewards is not None:
                hidden = ("prompt", "completion", "completion_ids")
                columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in hidden}
                self._stash.token_rewards = self.token_rewards(
                    prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
                )
        return rewards

    def _generate_single_turn(self, *args, **kwargs):
        heard = self._reads_policy() and not self._scores_old_policy()
        model, listener = self.accelerator.unwrap_model(self.model), self._listener
        parts = in_parts(model, self.generation_rows, listener.next_part)
        with without_dropout(self.model), parts, listener.listening() if heard else nullcontext():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        with self._clock.phase("generation"):
            return super()._generate(*args, **kwargs)

    # --- update time --------------------------------------------------------------------------------------------------

    def _logprobs(self, model: CausalModel, inputs, batch_size=None, aux_loss=False):
        """(log-probs [b, T], entropies [b, T], MoE auxiliary loss or None) of the completions under `model`."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        extras = {k: inputs[k] for k in EXTRAS if inputs.get(k) is not None}
        if aux_loss:
            extras["compute_aux_loss"] = True
        found = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], batch_size, compute_entropy=True, **extras
        )
        return found if len(found) == 3 else (*found, None)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield

    def _compute_loss(self, model: CausalModel, inputs):
        self._noise.before_loss(self)
        self._entropy.before_loss()
        whole, rows = inputs, self._credited_rows(inputs)
        inputs = inputs if rows is None else trimmed(inputs, rows)
        loss, stats, entropy = self._loss(model, inputs, self._regularises_routers())
        mask = loss_mask(inputs)
        if rows is not None and "clip_low_min" in stats:
            stats["clip_low_min"] = torch.zeros_like(stats["clip_low_min"])  # the rows left out clip nothing
        if "entropy_known" not in whole:
            stats["entropy"] = self._mean_entropy(model, whole, rows, zero_off(entropy, mask))
        tokens = {"in_loss": mask.sum(), "credited": (whole["advantages"] != 0).sum(), "tokens": loss_mask(whole).sum()}
        self._log_update(stats | tokens)
        return loss

    def _loss(self, model: CausalModel, inputs, routers: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss of these rows as their part of the step's, its stats, entropies [b, T]); `routers`: with the MoE
        auxiliary loss.
        """
        mask, credit = loss_mask(inputs), inputs["advantages"]
        logprob, entropy, aux_loss = self._logprobs(model, inputs, aux_loss=routers)
        old = inputs.get("old_per_token_logps")
        old = logprob.detach() if old is None else old
        loss, stats = self.method.surrogate(logprob, old, credit, mask, inputs.get("coefficient"))
        if "importance_sampling_ratio" in inputs:
            loss = loss * inputs["importance_sampling_ratio"]
        if self.beta != 0.0:
            kl = self._kl(logprob, old, inputs["ref_per_token_logps"], mask)
            stats["kl"] = token_mean(kl, mask)
            loss = loss + self.beta * (kl * zero_off(logprob - old, mask).exp() if self._corrects_kl() else kl)
        # The weights are those of the whole rollout batch; an optimizer step sees accumulation/steps_per_generation of
        # it, and distributed training averages over processes where the weights call for a sum.
        loss = (inputs["token_weight"] * zero_off(loss, mask)).sum() * self.accelerator.num_processes
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.model.training:
            loss = loss * self.args.steps_per_generation / accumulated
        if aux_loss is not None:
            stats["aux_loss"] = aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
        return loss, stats, entropy.detach()

    def _mean_entropy(self, model: CausalModel, inputs, rows: Tensor | None, entropy: Tensor) -> Tensor:
        """Mean token entropy of all rows, from the entropies of the credited ones and a forward pass over the
        others.
        """
        total = entropy.sum()
        if rows is not None:
            others = trimmed(inputs, ~rows)
            with self._measuring():
                total = total + zero_off(self._logprobs(model, others)[1], loss_mask(others)).sum()
        tokens = loss_mask(inputs).sum()
        return over(total, tokens.to(total.dtype))

    def _kl(self, logprob: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        """[b, T]: k3 against the reference."""
        gap = zero_off(ref - logprob, mask)
        return gap.exp() - gap - 1

    def _corrects_kl(self) -> bool:
        return getattr(self.args, "use_bias_correction_kl", False)

    def _regularises_routers(self) -> bool:
        return bool(getattr(self, "aux_loss_enabled", False))

    def _credited_rows(self, inputs) -> Tensor | None:
        """[b] bool: the rows of a micro-batch that carry a gradient, where others do not: those cost time and change
        nothing.

        None for all rows. At least one is kept, because every process takes part in every backward pass; for the same
        reason rows whose entropy is still to be measured are kept where there are several processes.
        """
        regularised = self.beta != 0.0 or self._regularises_routers()
        unmeasured = self.accelerator.num_processes > 1 and "entropy_known" not in inputs
        if not self.model.training or regularised or unmeasured or any(inputs.get(k) is not None for k in EXTRAS):
            return None
        rows = (inputs["advantages"] != 0).any(1)
        if "coefficient" in inputs:
            rows = rows | inputs["coefficient"].any(1)
        kept = int(rows.sum())
        if not kept:
            rows[0], kept = True, 1
        return None if kept == len(rows) else rows

    # --- what is logged -----------------------------------------------------------------------------------------------

    def _recording(self) -> bool:
        """Whether this rollout batch is the first of its `record_every` optimizer steps; the same after a resume."""
        step = self.state.global_step
        every = max(1, self.num_iterations * self.args.steps_per_generation // self.args.gradient_accumulation_steps)
        first = step % every == 0 and step // self.record_every != (step - every) // self.record_every
        return self._records and self.model.training and first and step != self._recorded

    def _log_rollouts(self, batch: GatheredBatch, credit: Tensor) -> None:
        figures = rollout_figures(batch, batch.rollouts, credit)
        for unit, number in self.sampled_besides.items():
            figures[f"sampled_{unit}"] += number
        self.sampled_besides = dict.fromkeys(self.sampled_besides, 0)
        for name, value in figures.items():
            if name != "reward":
                self._metrics["train" if self.model.training else "eval"][name].append(value)
        if self.model.training:
            self._figures = figures
        if self.log_completions:
            rewrite_table(self, batch, credit)
            self._token_columns = token_columns(batch, credit)
        if self._with_text:
            self._recorded = self.state.global_step
            if self.record is not None and self.accelerator.is_main_process:
                with self._clock.phase("record"):
                    self.record(batch.record(self, credit))

    def _log_update(self, stats: dict[str, Tensor]) -> None:
        self._pending.append(stats)
        if not self.accelerator.sync_gradients:
            return
        figures, self._pending = update_figures(self.accelerator, self._pending), []
        if self.model.training:
            self._clock.tokens += figures["tokens"] / self.num_iterations
        del figures["tokens"]
        for name, value in (figures | as_trl(figures)).items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def log(self, logs, start_time=None):
        """Adds seconds by phase and tokens per second since the last log, and at steps that reuse rollouts the
        rollouts' figures.
        """
        if self.model.training and "loss" in logs:
            logs |= self._clock.take()
            logs |= {name: value for name, value in self._figures.items() if name not in self._metrics["train"]}
        super().log(logs, start_time)
        if self.log_completions and self._token_columns and self.accelerator.is_main_process:
            extend_table(self, self._token_columns)
