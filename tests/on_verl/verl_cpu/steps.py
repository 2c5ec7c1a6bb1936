"""One step of verl's actor worker for every method, on two FSDP2 processes, against `Method.loss` in plain torch.

    torchrun --nproc_per_node 2 -m verl_cpu.steps FOLDER ROLLOUTS.json RESULT.json

The rollouts are those of the file. The policy that sampled them is the model of the folder; then two steps of GRPO move
it, so that ratios are not 1. Each method's loss and gradient is taken at that policy: by verl's engine from verl's old
log-probs and entropies, with the credit of the adapter, in micro-batches; and in plain torch on one process.
"""

import json
import os
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested, response_to_nested

from tokencredit import METHODS, Rollouts
from tokencredit.engines.verl.batch import assign
from tokencredit.engines.verl.carried import STORED
from tokencredit.engines.verl.configuration import settle
from tokencredit.engines.verl.losses import ChannelLoss
from tokencredit.scores.draws import uniform_draws
from verl_cpu.run import overrides

WIDTH = 48


def draw(name, mask):
    """A score that verl does not store, drawn: the same for both."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.rand(mask.shape, generator=generator) * mask


def nested(rows):
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


class Batch:
    """The rollouts of a file: what both sides start from."""

    def __init__(self, path):
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        self.prompts, self.completions = saved["prompts"], saved["completions"]
        self.reward, self.group = torch.tensor(saved["reward"]), saved["group"]
        length = torch.tensor([len(ids) for ids in self.completions])
        self.mask = torch.arange(int(length.max())) < length[:, None]

    def __len__(self):
        return len(self.reward)

    def as_verl(self, rows):
        """The fields that verl's rollout stores, of some rows."""
        prompts, completions = ([part[i] for i in rows] for part in (self.prompts, self.completions))
        ids = [a + b for a, b in zip(prompts, completions)]
        ones = [[1] * len(c) for c in completions]
        scores = [[0.0] * (len(c) - 1) + [float(self.reward[i])] for i, c in zip(rows, completions)]
        fields = {
            "prompts": nested(prompts),
            "responses": nested(completions),
            "response_mask": nested(ones),
            "loss_mask": nested(ones),
            "input_ids": nested(ids),
            "attention_mask": nested([[1] * len(x) for x in ids]),
            "position_ids": nested([list(range(len(x))) for x in ids]),
            "rm_scores": nested(scores),
        }
        return TensorDict(fields, batch_size=len(rows))


def composed(folder, group, prompts):
    """verl's whole configuration, as hydra makes it for a run."""
    own = [each for each in overrides(folder, prompts=prompts, group=group, steps=1) if not each.startswith("hydra")]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*own, "trainer.v1.trainer_mode=tokencredit_sync"])


def configured(config, method):
    """The configuration with a method in its carrier, which takes the scores that verl does not store from here."""
    scores = {name: f"verl_cpu.steps:{name}" for name in sorted(METHODS[method].needs - STORED)}
    config = deepcopy(config)
    with open_dict(config):
        config.trainer.v1.tokencredit = {"method": method, "scores": scores}
    return config


def __getattr__(name):
    """The scorer of a drawn score, as the carrier names it."""
    if name.startswith("_"):
        raise AttributeError(name)
    return lambda batch: draw(name, batch["response_mask"].bool())


def make_worker(config, micro):
    """verl's TrainingWorker, made as its ActorRolloutRefWorker makes it."""
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    made = TrainingWorkerConfig(
        model_type="language_model",
        model_config=actor.model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    engine = made.engine_config
    engine.use_dynamic_bsz, engine.use_remove_padding = False, False
    engine.infer_micro_batch_size_per_gpu = engine.micro_batch_size_per_gpu = micro
    worker = TrainingWorker(config=made)
    worker.reset()
    return worker


def with_options(data, micro, rows, old=False):
    """The data with what verl's workers add to it; `old`: with what the pass for the old policy gives besides."""
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=old,
        calculate_sum_pi_squared=old,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        use_fused_kernels=False,
        micro_batch_size_per_gpu=micro,
        global_batch_size=rows,
        max_token_len_per_gpu=NonTensorData(None),
    )
    return data


def gathered(x):
    """An object of every process, in the order of ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def old_policy(worker, data, rows, micro):
    """(log-probs, entropies, Σ p²) of these rows by verl's own inference pass."""
    with worker.engine.eval_mode():
        out = worker.engine.infer_batch(with_options(data.clone(), micro, rows, old=True), loss_function=None)
    mask = data["response_mask"]
    found = []
    for name in ("log_probs", "entropy", "sum_pi_squared"):
        x = out["model_output"][name]
        x = x if x.is_nested else nested(x)
        found.append(response_from_nested(x, mask).to_padded_tensor(0.0))
    return found


def pad(x, width):
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


class Plain:
    """The same model in plain torch, on whole padded rows."""

    def __init__(self, folder, batch):
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        self.batch = batch

    def forward(self):
        """(log-probs with gradient, entropies, Σ p²) [B, T] of the completions."""
        batch, width = self.batch, self.batch.mask.shape[1]
        rows = [p + c for p, c in zip(batch.prompts, batch.completions)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        there = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        log_p = self.model(input_ids=ids, attention_mask=there).logits.log_softmax(-1)
        first = torch.tensor([len(p) - 1 for p in batch.prompts])[:, None] + torch.arange(width)
        at = first.clamp(max=longest - 2)
        rows_of = log_p[torch.arange(len(batch))[:, None], at]
        chosen = rows_of.gather(2, ids.gather(1, at + 1)[..., None])[..., 0]
        entropy = -(rows_of.exp() * rows_of).sum(-1)
        squared = rows_of.exp().square().sum(-1)
        return [torch.where(batch.mask, x, 0.0) for x in (chosen, entropy.detach(), squared.detach())]

    def credit(self, method, old, entropy, squared):
        """(rollouts with these scores, their credit) by `Method` alone."""
        batch = self.batch
        scores = {"logprob": old, "entropy": entropy, "sum_p2": squared}
        scores |= {name: draw(name, batch.mask) for name in method.needs - STORED}
        if "uniform" in method.needs:
            scores["uniform"] = uniform_draws(0, 0, torch.arange(len(batch)), batch.mask.shape[1])
        rollouts = Rollouts(batch.reward, torch.tensor(batch.group), batch.mask, scores)
        return rollouts, method.credit(rollouts)

    def step(self, method, old, entropy, squared):
        """(credit, loss, {parameter: gradient}) of `Method` alone."""
        rollouts, credit = self.credit(method, old, entropy, squared)
        plan = method.plan(logprob=old, old_logprob=old, credit=credit, rollouts=rollouts)
        self.model.zero_grad()
        logprob, _, _ = self.forward()
        loss, _ = method.loss(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts, plan=plan)
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return credit, float(loss.detach()), gradient


def gradient_of(module):
    return {name: p.grad.full_tensor().clone() for name, p in module.named_parameters() if p.grad is not None}


def apart(a, b):
    """The largest difference of two dicts of tensors, over the largest number of the second."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in b) / max(float(x.abs().max()) for x in b.values())


def one_method(worker, config, batch, mine, data, old, entropy, squared, micro):
    """(credit [B, T], loss, gradient, how it was carried) by verl's engine."""
    settled = settle(config, "sync")
    whole = {
        "response_mask": batch.mask.long(),
        "rm_scores": torch.zeros(batch.mask.shape).index_put(
            (torch.arange(len(batch)), batch.mask.sum(1) - 1), batch.reward
        ),
        "old_log_probs": old,
        "entropy": entropy,
        "sum_p2": squared,
    }
    found = assign(whole, [str(g) for g in batch.group], [True] * len(batch), settled.method, settled.carrier)
    data = data.clone()
    fields = {"advantages": found.credit, "old_log_probs": old}
    if settled.carried.in_channel:
        fields |= {"token_weight": found.weight}
        fields |= {} if found.coefficient is None else {"coefficient": found.coefficient}
    for name, x in fields.items():
        data[name] = response_to_nested(x[mine], data["response_mask"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    loss_function = partial(ppo_loss, config=actor)
    if settled.carried.in_channel:
        loss_function = ChannelLoss(settled.method.surrogate, actor)
    engine = worker.engine
    with engine.train_mode():
        engine.optimizer_zero_grad()
        out = engine.forward_backward_batch(with_options(data, micro, len(batch)), loss_function)
        gradient = gradient_of(engine.module)
        engine.optimizer_zero_grad()
    loss = sum(gathered(float(sum(out["loss"])))) / dist.get_world_size()
    return found.credit, loss, gradient, settled.carried.loss_mode


def main(folder, rollouts, result):
    torch.set_num_threads(1)
    folder, batch = Path(folder), Batch(rollouts)
    prompts = len(set(batch.group))
    group = len(batch) // prompts
    dist_rows = len(batch) // int(os.environ["WORLD_SIZE"])
    micro = dist_rows // 2
    config = partial(configured, composed(folder, group, prompts))
    worker = make_worker(config("grpo"), micro)
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank * dist_rows, (rank + 1) * dist_rows))
    data = batch.as_verl(mine)
    width = batch.mask.shape[1]
    own = [pad(x, width) for x in old_policy(worker, data, len(batch), micro)]
    old = [torch.cat([part[k] for part in gathered(own)]) for k in range(3)]
    plain = Plain(folder, batch)
    with torch.no_grad():
        plain_old = plain.forward()
    for _ in range(2):
        _, _, gradient, _ = one_method(worker, config("grpo"), batch, mine, data, *old, micro)
        move(worker.engine.module, plain.model, gradient)
    found = {
        "sharded": type(next(worker.engine.module.parameters())).__name__,
        "processes": size,
        **{name: float((a - b).abs().max()) for name, a, b in zip(("old", "entropy", "sum_p2"), old, plain_old)},
        "methods": {},
    }
    for name in METHODS:
        credit, loss, gradient, loss_mode = one_method(worker, config(name), batch, mine, data, *old, micro)
        method = METHODS[name].within(WIDTH)
        expected = plain.step(method, *plain_old)
        size = float(expected[0].abs().max())
        found["methods"][name] = {
            "loss_mode": loss_mode,
            "credit": float((credit - expected[0]).abs().max()) / size,
            "credit_given_scores": float((credit - plain.credit(method, *old)[1]).abs().max()) / size,
            "loss": abs(loss - expected[1]),
            "loss_size": abs(expected[1]),
            "gradient": apart(gradient, expected[2]),
            "gradient_size": max(float(x.abs().max()) for x in expected[2].values()),
        }
    if rank == 0:
        Path(result).write_text(json.dumps(found, indent=1), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def move(module, model, gradient, size=0.05):
    """Both policies along the same gradient, by a step of a fixed length: verl's shards and the plain model."""
    norm = torch.stack([x.square().sum() for x in gradient.values()]).sum().sqrt()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= size * gradient[name] / norm
        for name, p in module.named_parameters():
            p -= distribute_tensor(size * gradient[name] / norm, p.device_mesh, p.placements)


if __name__ == "__main__":
    main(*sys.argv[1:])
