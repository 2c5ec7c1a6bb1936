"""What goes through a model together: budgets and shapes, what follows from them, and what is told meanwhile."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokencredit import limits
from tokencredit.argument_types import size
from tokencredit.lm import prefix_sampler, room
from tokencredit.lm.packing import together
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.proxies import exact_is_cheap, importance
from tokencredit.lm.room import LEAST, LIBRARIES, Room
from tokencredit.lm.sampling import Request, Trace
from tokencredit.pivotality.crew import Here
from tokencredit.pivotality.store import RolloutStore
from tokencredit.studies.arguments import check_prompts, usual
from tokencredit.studies.attribution.question import AttributeConfig
from tokencredit.studies.entropy.question import SMALL, SweepConfig
from tokencredit.studies.options import identity
from tokencredit.studies.study import Counting

TRACES = [Trace((1, 5, 9)), Trace((1, 7), (4, 6, 8))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=128, **shape, **heads)).eval()


def weights(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_budget_and_a_shape_give_rows_and_tokens(model):
    """By hand: D = 16, I = 32, V = 64, two layers of two heads, one of them for keys, 8 wide, in float32."""
    found = Room.of(model, weights(model) + LIBRARIES + LEAST)
    assert (found.space, found.cached) == (LEAST, 4 * 2 * 2 * 1 * 8)
    assert (found.forward, found.graph) == (4 * (16 * 16 + 8 * 32), 2048 + 4 * 2 * (16 * 16 + 3 * 32))
    assert (found.logits, found.column) == (4 * 8 * 64, 4 * 2)
    assert found.rows(100) == int(0.75 * LEAST / (1.2 * 128 * 132 + 2048)) == 9018
    assert found.prefixes() == LEAST // 4 // (2 * 128 + 2048)
    assert found.tokens() == 131_072 and found.tokens_back() == LEAST // 4864
    assert found.tokens_along(100) == LEAST // (3 * 2048 + 6 * 8 * 100)
    assert found.tokens_along(100, 8) == LEAST // (17 * 2048 + 8 * 6 * 8 * 100)
    assert found.tokens_attending(100) == LEAST // (2048 + 2 * 8 * 100)
    assert found.rows_trained(100, 20) == LEAST // (100 * found.graph + 20 * 1024)
    small = replace(found, space=1)
    assert small.rows_trained(9, 9) == 1
    assert [small.rows(9), small.tokens(), small.tokens_back(), small.tokens_along(9)] == [1] * 4, "one row goes alone"


def test_half_precision_takes_half(model):
    half = Room.of(LlamaForCausalLM(model.config).half())
    whole = Room.of(model)
    assert (2 * half.cached, 2 * half.graph, half.logits) == (whole.cached, whole.graph, whole.logits)


def test_the_default_follows_the_machine(model, monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 64 << 30)
    assert Room.of(model).space == room.USUAL
    monkeypatch.setattr(limits, "memory", lambda: 8 << 30)
    assert Room.of(model).space == 1 << 30


def test_beside_training_there_is_less_room(model, monkeypatch):
    """Gradient and two moments of the parameters in training come off the default."""
    monkeypatch.setattr(limits, "memory", lambda: 64 << 30)
    usual, one = Room.of(model).space, weights(model)
    assert Room.of(model, room.beside_training(model)).space == usual - 3 * one
    assert Room.of(model, room.beside_training(model, trained=usual)).space == usual // 2, "half of it at least"
    budget = one + LIBRARIES + 3 * one + LEAST
    assert Room.of(model, room.beside_training(model, budget)).space == LEAST
    with pytest.raises(ValueError, match=r"too little to train: .*give at least 1\.\d\dG, or train adapters"):
        room.beside_training(model, budget - 1)
    assert Room.of(model, room.beside_training(model, budget + one, held=one)).space == LEAST
    with pytest.raises(ValueError, match=r"weights, a reference model, gradient, moments"):
        room.beside_training(model, budget, held=one)
    monkeypatch.setattr(room, "USUAL", LEAST)
    assert Room.of(model, room.beside_training(model)).space == LEAST, "no less than a budget may be"


def test_a_budget_that_the_weights_exceed_is_refused_before_anything_is_sampled(model):
    with pytest.raises(ValueError, match=r"--memory 0.5G is too little: .* give at least 1.0\dG"):
        Room.of(model, 1 << 29)
    with pytest.raises(ValueError, match=r"--memory 0.25G is too little"):
        PolicyConfig(memory=1 << 28).open()


@pytest.mark.parametrize("text, number", [("4G", 4 << 30), ("1.5GiB", 3 << 29), ("800mb", 800 << 20), ("7", 7)])
def test_sizes_are_read_with_their_units(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "G", "many", "-1G", "0", "nan", "1X"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size like 4G"):
        size(text)


def test_memory_is_no_part_of_what_a_study_is():
    few, many = (SweepConfig(policy=PolicyConfig(memory=memory)) for memory in (None, 8 << 30))
    assert identity(few) == identity(many) and "memory" not in identity(many)["policy"]
    assert PolicyConfig(memory=8 << 30).as_dict() == PolicyConfig().as_dict()


def test_rows_go_together_up_to_their_number_and_their_padded_tokens():
    lengths = [3, 3, 4, 10, 2]
    assert list(together([4, 0, 1, 2, 3], lengths, rows=2, tokens=100)) == [[4, 0], [1, 2], [3]]
    assert list(together([4, 0, 1, 2, 3], lengths, rows=9, tokens=9)) == [[4, 0, 1], [2], [3]]
    assert list(together([], lengths, rows=2, tokens=9)) == []


def requests(num: int = 20) -> list[Request]:
    return [Request(i % 2, 2 * (i % 2), 12, i) for i in range(num)]


def test_a_sampler_never_decodes_more_rows_than_there_is_room_for(model):
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    free, tight = (PrefixSampler(model, ends=[2]) for _ in range(2))
    tight.room = replace(tight.room, space=int(3.5 * (1.2 * 128 * (3 + 1 + 12 + 2 + 32) + 2048) / 0.75))
    assert (free.rows(TRACES, requests()), tight.rows(TRACES, requests())) == (512, 3)
    expected = {i: r.ids for i, r in free.continue_(TRACES, requests())}
    seen.clear()
    found = {i: r.ids for i, r in tight.continue_(TRACES, requests())}
    handle.remove()
    assert found == expected and max(rows for rows, width in seen if width == 1) == 3


def test_progress_moves_while_rows_are_written(model, monkeypatch):
    """Nothing has ended yet when the first word comes; in the end it adds up to the rows and tokens."""
    monkeypatch.setattr(prefix_sampler, "TELL", 1)
    heard: list[tuple[float, int]] = []
    sampler = PrefixSampler(model, ends=[2])
    found = sampler.continue_(TRACES, [*requests(), Request(0, 0, 0, 0)], lambda *told: heard.append(told))
    assert next(found)[1].ids == () and not heard
    next(found)
    early = [rows for rows, _ in heard[1:-1]]
    assert heard[0] == (1,) and early and all(0 < rows < 20 for rows in early)
    tokens = sum(told[1] for told in heard[1:])
    assert 0 < tokens < 20 * 12
    list(found)
    assert sum(told[0] for told in heard) == pytest.approx(21)


def test_a_small_run_that_is_killed_keeps_its_parts(tmp_path, model):
    """What may be long goes into small parts: half of a small run is there when it is killed in the middle."""

    class Dying(PrefixSampler):
        calls = 0

        def continue_(self, traces, some, progress=None):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            yield from super().continue_(traces, some, progress)

    asked = [Request(i % 2, 0, 100, i) for i in range(40)]
    judge = lambda k, ids, cut: len(ids) % 2 == 0  # noqa: E731
    sampler = Dying(model, ends=[2])
    with pytest.raises(KeyboardInterrupt):
        RolloutStore(tmp_path / "cut", {}).collect(TRACES, asked, Here(sampler, judge))
    assert len(list((tmp_path / "cut" / "parts").glob("*.parquet"))) == 1
    heard: list[float] = []
    cut = RolloutStore(tmp_path / "cut", {}).collect(
        TRACES, asked, Here(sampler, judge), progress=lambda n, *_: heard.append(n)
    )
    whole = RolloutStore(None, {}).collect(TRACES, asked, Here(PrefixSampler(model, ends=[2]), judge))
    assert (cut.length == whole.length).all() and heard[0] == 20 and sampler.calls == 3, (
        "the part that was there is not sampled again"
    )


def test_auto_weighs_parameters_and_tokens(model):
    large, small = (SimpleNamespace(num_parameters=p, named={"w": None}) for p in (135_000_000, 100_000))
    assert exact_is_cheap(100_000, small, longest=63, width=200)
    assert not exact_is_cheap(100_000, small, longest=64, width=200)
    assert not exact_is_cheap(135_000_000, large, longest=20, width=60), "20 backward passes against 14 forward ones"
    assert exact_is_cheap(135_000_000, large, longest=7, width=60)
    assert exact_is_cheap(135_000_000, large, longest=20, width=60, directions=64)
    adapter = SimpleNamespace(num_parameters=500_000, named={"lora_A": None})
    assert exact_is_cheap(1_000_000, adapter, longest=100, width=60)
    assert not exact_is_cheap(1_500_000_000, adapter, longest=100, width=160), "a small adapter in a large model"


def test_directions_that_are_asked_for_are_taken(model):
    ids = torch.arange(3, 13)[None]
    wanted = torch.ones_like(ids)
    wanted[0, :4] = 0
    found = [
        importance(model, ids, torch.ones_like(ids), wanted, ("gradient_norm",), num_directions=number)
        for number in (None, 4)
    ]
    assert [each["gradient_norm"].method for each in found] == ["exact", "finite_difference"]
    assert [each.num_directions for each in found] == [8, 4]


def test_default_sizes_follow_model_and_task():
    assert usual(8192, 109_000) == 8192 and usual(8192, 109_000, there=7473) == 7473
    assert usual(8192, 135_000_000) == round(8192 * 2**22 / 135_000_000) == 255
    assert usual(64, 10**12) == 24 and usual(64, 10**12, there=10) == 10
    sizes = lambda c: (c.eval_prompts, c.sweep_prompts, c.sub_batch)  # noqa: E731
    assert sizes(SweepConfig().fitted(109_000, None)) == (8192, 1024, 256)
    assert sizes(SweepConfig(**SMALL).fitted(109_000, None)) == (2048, 256, 256)
    assert sizes(SweepConfig().fitted(109_000, 7473)) == (7473, 934, 256)
    assert sizes(SweepConfig().fitted(135_000_000, 7473)) == (255, 31, 31)
    assert sizes(SweepConfig(eval_prompts=9000, sub_batch=3).fitted(10**9, 7473)) == (9000, 1024, 3), "as asked"
    assert AttributeConfig().fitted(109_000, None).entropy == (1024, 4)
    fitted = AttributeConfig(reward=(40, 2)).fitted(135_000_000, 7473)
    assert (fitted.entropy, fitted.reward) == ((32, 4), (40, 2))


def test_too_many_prompts_are_refused_by_their_flag():
    task = SimpleNamespace(rows=lambda split, num, seed: [{}] * 7473)
    checkpoint = SimpleNamespace(task=task, config=SimpleNamespace(task="gsm8k"))
    check_prompts(checkpoint, {"--prompts": 64, "--eval-prompts": 7473})
    with pytest.raises(ValueError, match=r"--eval-prompts 8,192: the train part of gsm8k has 7,473 prompts"):
        check_prompts(checkpoint, {"--prompts": 64, "--eval-prompts": 8192})


def test_what_is_done_is_counted_in_words():
    heard: list[str] = []
    count = Counting(heard.append, "rolling out", "rollouts", 200)
    count(0.5, 30)
    count(99.5, 1970)
    assert heard[0].startswith("rolling out: 0 of 200 rollouts, 30 tokens, ")
    assert heard[1].startswith("rolling out: 100 of 200 rollouts, 2,000 tokens, ") and heard[1].endswith(" left")
