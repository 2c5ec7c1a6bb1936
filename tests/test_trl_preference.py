"""PreferenceTrainer: stock TRL with a weight per token."""

import random

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tokencredit.credit import Chain, Outcome, TopFraction
from tokencredit.engines.trl_preference import PreferenceTrainer
from tokencredit.lm.load import load_model, resolve_model
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.scoring import score
from tokencredit.pivotality.export import Pair, write_pairs
from tokencredit.preference import PREFERENCES, Hinge, Pairs, PreferenceMethod
from trl_tiny import PLAIN, tiny_model, tiny_tokenizer, weights


def settings(folder, **changes):
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        learning_rate=0.1,
    )
    return DPOConfig(**PLAIN | values | changes)


def written(num=16, seed=0):
    """Pairs as text, ragged, some with a common beginning."""
    draw = random.Random(seed)
    rows = []
    for i in range(num):
        start = " ".join(draw.choices("0123456789", k=i % 3))
        sides = [" ".join([start, *draw.choices("0123456789", k=draw.randint(1, 5))]).strip() for _ in range(2)]
        rows.append({"prompt": f"{i % 7} + {i % 4} = ", "chosen": sides[0] + " ", "rejected": sides[1] + " "})
    return Dataset.from_list(rows)


def build(cls, folder, changes=None, **keywords):
    keywords = {
        "train_dataset": written(),
        "processing_class": tiny_tokenizer(),
        "model": tiny_model(),
        "ref_model": tiny_model(3),
    } | keywords
    return cls(args=settings(folder, **changes or {}), **keywords)


def ids_of(folder):
    """The pairs as stock TRL tokenizes them."""
    made = build(DPOTrainer, folder).train_dataset
    return made.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])


def scored(rows, name, seed=0):
    """The rows with a score drawn for every token."""
    draw = random.Random(seed)
    for side in ("chosen", "rejected"):
        values = [[draw.uniform(-1, 1) for _ in ids] for ids in rows[f"{side}_ids"]]
        rows = rows.add_column(f"{side}_{name}", values)
    return rows


def logged(trainer):
    return [record for record in trainer.state.log_history if "loss" in record]


def test_dpo_is_stock_trl_step_by_step(tmp_path):
    """From text and from ids, with accumulation and an evaluation: every weight, loss and figure of TRL's."""
    how = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    stock = build(DPOTrainer, tmp_path, how, eval_dataset=written(6, 1))
    stock.train()
    for rows in (written(), ids_of(tmp_path)):
        ours = build(PreferenceTrainer, tmp_path, how, train_dataset=rows, eval_dataset=written(6, 1), method="dpo")
        ours.train()
        assert torch.allclose(weights(ours), weights(stock), atol=1e-7)
        for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
            same = [name for name in theirs if not name.endswith(("runtime", "per_second"))]
            assert [mine[name] for name in same] == pytest.approx([theirs[name] for name in same], abs=1e-5)
    assert not torch.allclose(weights(ours), weights(build(DPOTrainer, tmp_path)), atol=1e-3)


def test_a_link_of_the_method_is_trls_loss_of_that_name(tmp_path):
    stock = build(DPOTrainer, tmp_path, {"loss_type": ["hinge"], "beta": 0.3})
    ours = build(PreferenceTrainer, tmp_path, method=PREFERENCES["dpo"].replace(link=Hinge(), beta=0.3))
    for trainer in (stock, ours):
        trainer.train()
    assert torch.allclose(weights(ours), weights(stock), atol=1e-7)


def loss_by_hand(policy, reference, rows, method, scores):
    """The loss of one batch, from log-probs of the plain models."""
    prompts = [*rows["prompt_ids"], *rows["prompt_ids"]]
    completions = [*rows["chosen_ids"], *rows["rejected_ids"]]
    width = max(map(len, completions))
    mask = torch.tensor([[t < len(ids) for t in range(width)] for ids in completions])

    def grid(found):
        return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in found])

    own, ref = (score(model, prompts, completions) for model in (policy, reference))
    scores = {name: grid(ref[name] if given is None else given) for name, given in scores.items()}
    pairs = Pairs(mask, scores)
    given = {"logprob": grid(own["logprob"]), "ref_logprob": grid(ref["logprob"])}
    return float(method.loss(**given, credit=method.credit(pairs), pairs=pairs)[0])


@pytest.mark.parametrize("name", ["dpo_entropy", "dpo_forking", "dpo_pivotal", "tgdpo", "tis_dpo", "simpo", "sepo"])
def test_every_entry_trains_by_its_weights(tmp_path, name):
    """The logged loss, before and after an update, is the algebra's on the plain models' log-probs; entropies are those
    of the reference, which does not move.
    """
    method, rows = PREFERENCES[name], ids_of(tmp_path).select(range(4))
    given = {}
    for other in method.needs - {"entropy"}:
        rows = scored(rows, other)
        given[other] = [torch.tensor(x) for side in ("chosen", "rejected") for x in rows[f"{side}_{other}"]]
    how = {"max_steps": 1, "learning_rate": 0.02}
    trainer = build(PreferenceTrainer, tmp_path, how, train_dataset=rows, method=name)
    trainer.train()
    scores = given | ({"entropy": None} if "entropy" in method.needs else {})
    assert logged(trainer)[0]["loss"] == pytest.approx(
        loss_by_hand(tiny_model(), tiny_model(3), rows, method, scores), abs=1e-5
    )
    moved = trainer.evaluate(rows)["eval_loss"]
    assert moved == pytest.approx(loss_by_hand(trainer.model, tiny_model(3), rows, method, scores), abs=1e-5)
    assert moved < logged(trainer)[0]["loss"]
    assert (trainer.ref_model is None) == (name in ("simpo", "sepo"))


def test_weights_differ_from_dpo_only_where_scores_do(tmp_path):
    trained = {}
    for name in ("dpo", "dpo_entropy"):
        trainer = build(PreferenceTrainer, tmp_path, method=name)
        trainer.train()
        trained[name] = weights(trainer)
    level = ids_of(tmp_path)
    for side in ("chosen", "rejected"):
        level = level.add_column(f"{side}_entropy", [[0.7] * len(ids) for ids in level[f"{side}_ids"]])
    flat = build(PreferenceTrainer, tmp_path, method="dpo_entropy", train_dataset=level)
    flat.train()
    assert torch.allclose(weights(flat), trained["dpo"], atol=1e-6)
    assert not torch.allclose(trained["dpo"], trained["dpo_entropy"], atol=1e-3)


def test_micro_batches_of_weighted_pairs_add_up(tmp_path):
    rows = ids_of(tmp_path).add_column("weight", [float(i % 5) for i in range(16)])
    made = []
    for size, every in ((4, 1), (2, 2), (1, 4)):
        how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": every}
        trainer = build(PreferenceTrainer, tmp_path, how, train_dataset=rows, method="dpo_entropy")
        trainer.train()
        made.append(weights(trainer))
    assert torch.allclose(made[0], made[1], atol=1e-6) and torch.allclose(made[0], made[2], atol=1e-6)
    unweighted = build(PreferenceTrainer, tmp_path, train_dataset=rows.remove_columns("weight"), method="dpo_entropy")
    unweighted.train()
    assert not torch.allclose(weights(unweighted), made[0], atol=1e-3)


def test_pairs_of_weight_zero_train_nothing(tmp_path):
    rows = ids_of(tmp_path)
    few = build(PreferenceTrainer, tmp_path, {"per_device_train_batch_size": 1, "max_steps": 8}, train_dataset=rows)
    some = rows.add_column("weight", [float(i == 3) for i in range(16)])
    moved = build(PreferenceTrainer, tmp_path, {"per_device_train_batch_size": 16, "max_steps": 1}, train_dataset=some)
    alone = build(
        PreferenceTrainer,
        tmp_path,
        {"per_device_train_batch_size": 1, "max_steps": 1},
        train_dataset=rows.select([3]),
    )
    start = weights(few)
    for trainer in (moved, alone):
        trainer.train()
    assert torch.allclose(weights(moved), weights(alone), atol=1e-6) and not torch.equal(weights(alone), start)


@pytest.mark.parametrize("name", ["dpo", "dpo_entropy"])
def test_with_an_adapter_the_reference_is_the_model_without_it(tmp_path, name):
    """One step of LoRA: TRL's own with dpo; with entropy the loss of the first step is the whole model's."""
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    how = {"peft_config": adapter, "ref_model": None}
    ours = build(PreferenceTrainer, tmp_path, {"max_steps": 2}, method=name, **how)
    ours.train()
    if name == "dpo":
        stock = build(DPOTrainer, tmp_path, {"max_steps": 2}, **how)
        stock.train()
        assert torch.allclose(weights(ours), weights(stock), atol=1e-7)
        return
    rows = {"train_dataset": ids_of(tmp_path).select(range(4)), "method": name}
    still = build(PreferenceTrainer, tmp_path, {"learning_rate": 0.0, "max_steps": 1}, **rows, **how)
    still.train()
    by_hand = loss_by_hand(still.model, tiny_model(), rows["train_dataset"], PREFERENCES[name], {"entropy": None})
    assert logged(still)[0]["loss"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    ("option", "value", "alternative"),
    [
        ("loss_type", ["ipo"], "link=Squared()"),
        ("loss_weights", [0.5], "the link is the method's"),
        ("label_smoothing", 0.1, "Logistic(smoothing=...)"),
        ("beta", 0.3, "method.replace(beta=...)"),
        ("f_divergence_type", "js_divergence", "no other divergence"),
        ("ld_alpha", 0.5, "LengthMean()"),
        ("use_weighting", True, '"weight"'),
        ("precompute_ref_log_probs", True, "each token's"),
        ("padding_free", True, "switched off"),
        ("truncation_mode", "keep_end", "shorten prompts"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
def test_options_that_contradict_the_method_are_refused_by_name(tmp_path, option, value, alternative):
    with pytest.raises(ValueError) as caught:
        build(PreferenceTrainer, tmp_path, {option: value}, method="dpo_entropy")
    assert all(text in str(caught.value) for text in (f"{option}={value!r}", '"dpo_entropy"', alternative))


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path):
    rows = ids_of(tmp_path)

    def refused(match, changes=None, error=ValueError, **keywords):
        with pytest.raises(error, match=match):
            build(PreferenceTrainer, tmp_path, changes, **keywords)

    refused('Did you mean "dpo_entropy"', error=KeyError, method="dpo_entrop")
    refused(r"dpo_pivotal.*columns chosen_before_after, rejected_before_after\n.*re-sampled", method="dpo_pivotal")
    refused("sync_ref_model=True moves the reference", {"sync_ref_model": True}, method="dpo_entropy")
    refused("leave data_collator out", data_collator=lambda rows: rows)
    refused("train_dataset is required", train_dataset=None)
    refused("weighs tokens of text alone", train_dataset=rows.add_column("image", [None] * 16))
    batch = PreferenceMethod("mine", Chain(Outcome(), TopFraction("entropy", 0.2, "batch")))
    refused(r'weighs a pair by the pairs beside it.*scope="group"', method=batch)
    text = written().add_column("chosen_entropy", [[1.0]] * 16).add_column("rejected_entropy", [[1.0]] * 16)
    refused("are per token of ids", train_dataset=text, method="dpo_entropy")
    short = scored(rows, "before_after")
    bad = Dataset.from_list([{**row, "chosen_before_after": [0.1] * 9} for row in short])
    refused("pair 0 has 9 numbers in chosen_before_after for", train_dataset=bad, method="dpo_pivotal")
    refused("the eval dataset lacks chosen_before_after", train_dataset=short, eval_dataset=rows, method="dpo_pivotal")
    empty = Dataset.from_list([{**row, "rejected_ids": []} for row in rows])
    refused("pair 0 has no tokens in rejected_ids", train_dataset=empty)
    refused("not negative, and not all 0", train_dataset=rows.add_column("weight", [0.0] * 16))
    stream = rows.add_column("weight", [1.0] * 16).to_iterable_dataset()
    refused("load it whole", train_dataset=stream)
    refused("of 16 pairs fill max_length=3: no token to train on is left", {"max_length": 3}, train_dataset=rows)


def test_what_is_left_out_is_said(tmp_path):
    long = Dataset.from_list(
        [{"prompt_ids": [4] * n, "chosen_ids": [5, 6], "rejected_ids": [7]} for n in (2, 3, 9, 12)]
    )
    with pytest.warns(UserWarning, match="the prompts of 2 of 4 pairs fill max_length=9"):
        trainer = build(PreferenceTrainer, tmp_path, {"max_length": 9}, train_dataset=long)
    assert len(trainer.train_dataset) == 2
    flat = long.select([0, 1])
    for side in ("chosen", "rejected"):
        flat = flat.add_column(f"{side}_before_after", [[0.0] * len(ids) for ids in flat[f"{side}_ids"]])
    trainer = build(PreferenceTrainer, tmp_path, {"max_steps": 2}, train_dataset=flat, method="dpo_pivotal")
    with pytest.warns(UserWarning, match="no token of a batch of 2 pairs has weight under dpo_pivotal"):
        trainer.train()
    assert logged(trainer)[0]["credited_share"] == 0


def test_scores_are_cut_with_the_tokens(tmp_path):
    rows = scored(ids_of(tmp_path), "before_after")
    trainer = build(PreferenceTrainer, tmp_path, {"max_length": 7}, train_dataset=rows, method="dpo_pivotal")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    assert batch["score_before_after"].shape == batch["input_ids"].shape and batch["input_ids"].shape[1] == 7
    for i, row in enumerate(rows.select(range(8))):
        at = batch["completion_mask"][8 + i].bool()
        found = batch["score_before_after"][8 + i][at]
        assert torch.equal(found, torch.tensor(row["rejected_before_after"])[: len(found)]) and len(found)


# What exported pairs train.


def pivots(policy, num=16):
    """Pairs of one token each in the middle of sampled completions: the written token against another digit."""
    digits = policy.tokenizer.convert_tokens_to_ids(list("0123456789"))
    prompts = policy.encode_rows(policy.task.rows("train", num, 0))
    pairs = []
    for i, (prompt, (completion,)) in enumerate(zip(prompts, policy.complete(prompts, 1, seed=0))):
        half = len(completion.ids) // 2
        other = next(d for d in digits if d != completion.ids[half])
        rate = (0.5, 0.3, 0.7)
        before = [*prompt, *completion.ids[:half]]
        pairs.append(Pair(i, half, before, completion.ids[half], other, completion.ids[half], rate, rate, rate, 64))
    return pairs


def test_pairs_of_tokens_teach_nothing_of_the_end(tmp_path):
    """What `pivotality export` writes, in twenty steps on the embedded model: from ids the chance that a completion
    ends behind the chosen token stays what it was. As text stock TRL puts an end token behind either side: it rises.
    """
    path, policy = resolve_model("reckon"), PolicyConfig().open()
    tokenizer, pairs = policy.tokenizer, pivots(policy)
    write_pairs(tmp_path / "pairs.jsonl", pairs, tokenizer)
    exported = Dataset.from_json(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    text = exported.rename_columns({f"{x}_text": x for x in ("prompt", "chosen", "rejected")})
    text = text.select_columns(["prompt", "chosen", "rejected"])
    prompts = [[*pair.prefix_ids, pair.chosen_id] for pair in pairs]

    def end(model):
        ends = [[tokenizer.eos_token_id]] * len(pairs)
        return torch.stack(score(model, prompts, ends)["logprob"]).exp().mean().item()

    found = {}
    for cls, rows in ((PreferenceTrainer, exported), (DPOTrainer, text)):
        model = load_model(path)
        before = end(model)
        how = {
            "max_steps": 20,
            "per_device_train_batch_size": 16,
            "optim": "adamw_torch",
            "learning_rate": 3e-4,
        }
        trainer = build(
            cls,
            tmp_path,
            how,
            model=model,
            ref_model=load_model(path),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        found[cls] = end(model) - before
    assert abs(found[PreferenceTrainer]) < 1e-3 and found[DPOTrainer] > 0.01, found
