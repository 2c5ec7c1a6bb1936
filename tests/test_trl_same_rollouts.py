"""The rollouts of a file through the TRL engine: credit and loss are `Method`'s.

`on_verl/test_steps.py` has the same of the verl engine, on the same file: what one engine trains, the other does.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from tokencredit import METHODS, Rollouts
from tokencredit.engines.trl import CreditTrainer
from tokencredit.scores.table import FREE
from tokencredit.tasks import reckon
from trl_tiny import PLAIN

SAVED = json.loads((Path(__file__).parent / "data" / "reckon_rollouts.json").read_text())
MODEL = Path(reckon.__file__).parent / "reckon_model"
GROUP, WIDTH = 4, 48


class Replayed(CreditTrainer):
    """Samples what the file holds, and keeps its credit and the loss of every optimizer step with its weights."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        assert [list(ids) for ids in prompt_ids] == SAVED["prompts"]
        return SAVED["completions"], None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list, *args, **kwargs):
        super()._calculate_rewards(inputs, prompts, completions, completion_ids_list, *args, **kwargs)
        self._stash.rewards = torch.tensor(SAVED["reward"])[:, None]
        return self._stash.rewards

    def _assign(self, batch):
        self.scores = batch.scores
        self.credit, plan = super()._assign(batch)
        return self.credit, plan

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.kept.append((float(loss.detach()), {n: x.clone() for n, x in model.state_dict().items()}))
        return loss


def replay(method, folder):
    args = GRPOConfig(
        str(folder),
        **PLAIN,
        per_device_train_batch_size=len(SAVED["reward"]),
        num_generations=GROUP,
        num_iterations=2,
        max_completion_length=WIDTH,
        max_steps=2,
        learning_rate=5.0,
        shuffle_dataset=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer.decode(SAVED["prompts"][k]) for k in range(0, len(SAVED["prompts"]), GROUP)]
    trainer = Replayed(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        [lambda completions, **_: [0.0] * len(completions)],
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        method=method,
        max_rounds=1,
    )
    trainer.kept = []
    trainer.train()
    return trainer


def plain(weights=None):
    """(log-probs, entropies) [B, T] of the file's completions, one row after the other, without padding."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if weights is not None:
        model.load_state_dict(weights)
    lengths = [len(ids) for ids in SAVED["completions"]]
    logprob, entropy = torch.zeros(2, len(lengths), max(lengths))
    with torch.no_grad():
        for k, (prompt, ids) in enumerate(zip(SAVED["prompts"], SAVED["completions"])):
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            log_p = logits.log_softmax(-1)
            logprob[k, : len(ids)] = log_p[torch.arange(len(ids)), torch.tensor(ids)]
            entropy[k, : len(ids)] = -(log_p.exp() * log_p).sum(-1)
    return logprob, entropy


@pytest.fixture(scope="module")
def old():
    return dict(zip(("logprob", "entropy"), plain()))


MEASURED = [name for name, method in METHODS.items() if method.needs <= FREE]


@pytest.mark.parametrize("name", MEASURED)
def test_the_engine_trains_the_method(name, old, tmp_path):
    """The second step on a batch, whose ratios are not 1: the gradient of the first has moved the policy."""
    method = METHODS[name].within(WIDTH)
    trainer = replay(METHODS[name], tmp_path)
    logprob = old["logprob"]
    width = logprob.shape[1]
    mask = torch.arange(width) < torch.tensor([len(ids) for ids in SAVED["completions"]])[:, None]
    scores = {score: trainer.scores[score][:, :width] for score in old if score in trainer.scores}
    for score, x in scores.items():
        torch.testing.assert_close(x, old[score], rtol=0, atol=1e-5)
    rollouts = Rollouts(torch.tensor(SAVED["reward"]), torch.tensor(SAVED["group"]), mask, scores)
    credit = method.credit(rollouts)
    assert torch.equal(trainer.credit[:, :width], credit)
    loss, weights = trainer.kept[1]
    moved, _ = plain(weights)
    assert float((moved - logprob).abs().max()) > 1e-3
    plan = method.plan(logprob=logprob, old_logprob=logprob, credit=credit, rollouts=rollouts)
    expected, _ = method.loss(logprob=moved, old_logprob=logprob, credit=credit, rollouts=rollouts, plan=plan)
    assert loss == pytest.approx(float(expected), abs=1e-5, rel=1e-4)
