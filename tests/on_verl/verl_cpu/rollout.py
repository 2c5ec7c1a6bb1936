"""A rollout engine without a server: weights go through a file, completions come from `PrefixSampler`.

verl's own weight synchronisation calls `WeightFile`; its agent loop manager is `Sampling`, which samples in the
trainer's process and writes what verl's would write to TransferQueue.
"""

from pathlib import Path

import torch
import torch.distributed
import transfer_queue as tq
from safetensors.torch import load_file, save_file
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.base import BaseRollout

from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.prompts import encode_prompt
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.tasks import load

NAME = "tokencredit_local"


def folder(model: str) -> Path:
    """Where the weights of every step lie: beside the model that a run starts from."""
    return Path(model).parent / "weights"


class WeightFile(BaseRollout):
    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=0, **options):
        """Every rank takes part in gathering; the first writes."""
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights}
        if torch.distributed.get_rank() == 0:
            weights = folder(self.model_config.path)
            save_file(tensors, weights / "partial")
            (weights / "partial").replace(weights / f"step_{global_steps}.safetensors")
        torch.distributed.barrier()


def no_server():
    """The class of a replica that starts nothing."""
    from verl.workers.rollout.replica import RolloutReplica

    class Replica(RolloutReplica):
        async def launch_servers(self):
            self._server_address = f"{NAME}_{self.replica_rank}"

    return Replica


class Sampling:
    """What verl's `agent_loop_manager_class` names: n completions of every prompt, verified."""

    def __init__(self, config, **handles):
        self.config, self.task, self.calls = config, load("reckon"), 0

    @classmethod
    def create(cls, *args, **options):
        return cls(*args, **options)

    def _model(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self.config.actor_rollout_ref.model.path
        newest = max(folder(path).glob("step_*.safetensors"), key=lambda file: int(file.stem.removeprefix("step_")))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.load_state_dict(load_file(newest))
        return model, AutoTokenizer.from_pretrained(path)

    def generate_sequences(self, batch):
        rollout, limit = self.config.actor_rollout_ref.rollout, self.config.data.max_response_length
        rows = [plain(row) for row in batch["extra_info"]]
        step = plain(batch["global_steps"])
        model, tokenizer = self._model()
        prompts = [Trace(tuple(encode_prompt(tokenizer, row["prompt"], chat=None))) for row in rows]
        sampler = PrefixSampler(model, ends=end_tokens(model, tokenizer), settings=Settings(rollout.temperature))
        requests = [
            Request(k, 0, limit, seed_of("verl", self.calls, row["index"], n))
            for k, row in enumerate(rows)
            for n in range(rollout.n)
        ]
        self.calls += 1
        found = dict(sampler.continue_(prompts, requests))
        for k, (uid, row) in enumerate(zip(map(str, map(plain, batch["uid"])), rows)):
            sampled = [found[k * rollout.n + n] for n in range(rollout.n)]
            fields = [self._fields(uid, row, prompts[k].prompt, each, tokenizer) for each in sampled]
            keys = [f"{uid}_{n}_0" for n in range(rollout.n)]
            tags = [tag(field, step) for field in fields]
            tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id="train")
            tq.kv_batch_put(keys=[uid], tags=[{"status": "finished"}], partition_id="train")

    def _fields(self, uid, row, prompt, sampled, tokenizer):
        text = tokenizer.decode(list(sampled.ids), skip_special_tokens=True)
        reward = float(self.task.verify(text, row, sampled.truncated).correct)
        prompt, answer = torch.tensor(prompt), torch.tensor(sampled.ids)
        ids, mask, scores = torch.cat([prompt, answer]), torch.ones_like(answer), torch.zeros(len(answer))
        scores[-1] = reward
        return {
            "uid": uid,
            "prompts": prompt,
            "responses": answer,
            "response_mask": mask,
            "loss_mask": mask,
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "attention_mask": torch.ones_like(ids),
            "num_turns": 2,
            "rm_scores": scores,
            "rollout_log_probs": torch.tensor(sampled.logprob),
            "extra_fields": {"reward_extra_info": {"acc": reward}},
        }


def tag(field, step):
    lengths = {"prompt_len": len(field["prompts"]), "response_len": len(field["responses"])}
    lengths["seq_len"] = sum(lengths.values())
    return (
        lengths | dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step) | {"status": "success"}
    )


def plain(value):
    """A value out of TensorDict's wrapping."""
    return value.data if hasattr(value, "data") and not isinstance(value, dict) else value
