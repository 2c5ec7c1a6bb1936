"""What a model of more than 2²⁴ parameters is asked with: prompts that completions share, vectors in files, one sweep
for all directions. A small model is called large here, so that both ways can be compared.
"""

import pytest
import torch
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tokencredit.dynamics import vectors
from tokencredit.dynamics.optimizer import Moments, OptimizerState, Rule
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.sweep import Sweep
from tokencredit.dynamics.vectors import Derived, Filed, FiledMatrix, dot, dots, forget
from tokencredit.lm import shared_prompts
from tokencredit.lm.readout import find_readout
from tokencredit.lm.shared_prompts import shared, shares_prompts

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[1, 2, 3]] * 2 + [[9, 9]]
COMPLETIONS = [[11, 12, 13], [14], [15, 16, 17, 18], [20, 21], [22, 23, 24], [30, 31]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **SHAPE, **HEADS)).eval()


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def large(monkeypatch, limit=0):
    monkeypatch.setattr(vectors, "FINE", limit)


def seen_by(model):
    """What its body is given, call by call."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("tokens", (1, 1 << 14))
def test_a_shared_prompt_changes_no_figure(model, weights, monkeypatch, tokens):
    """Values, both modes of derivatives and products by group; chunks of one row, and all rows in one."""
    alone = Passes(model, PROMPTS, COMPLETIONS, temperature=0.7)
    direction = alone.reverse(*weights)
    groups = [torch.tensor([k == q for k in (0, 0, 0, 1, 1, 2)]) for q in range(3)]
    expected = [
        *alone.values(),
        *alone.forward(direction),
        *[alone.reverse(*(w * g[:, None] for w in weights)) for g in groups],
    ]
    large(monkeypatch)
    together = Passes(model, PROMPTS, COMPLETIONS, temperature=0.7, tokens=tokens)
    assert together.shared
    for found, known in zip([*together.values(), *together.forward(direction)], expected):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)
    found = together.products([weights], groups, [direction])[0]
    torch.testing.assert_close(
        found, torch.tensor([dot(g, direction) for g in expected[4:]]).double(), rtol=1e-4, atol=1e-5
    )


def test_a_prompt_goes_through_the_model_once(model, weights, monkeypatch):
    """Eight tokens of prompts and as many of completions as there is a later one to score: the last of each is not
    read.
    """
    large(monkeypatch)
    both = Passes(model, PROMPTS, COMPLETIONS)
    assert both.shared
    seen = seen_by(model)
    both.values()
    assert sorted(seen) == [(3, 5 + 2 + 0 + 3)]
    seen.clear()
    first = torch.zeros(6, 4, dtype=torch.float64)
    first[2, 1] = 1.0
    both.reverse(first)
    assert seen == [(1, 5 + 1)], "one completion, up to the token with a weight"


def test_few_completions_share_a_long_row(model, monkeypatch):
    batch = Passes(model, PROMPTS, COMPLETIONS).batch
    start = torch.tensor([len(p) for p in PROMPTS])
    monkeypatch.setattr(shared_prompts, "MOST", 8)
    rows = [part.ids.shape for part, _ in shared(batch, start, 1)]
    assert rows == [(1, 8), (1, 7), (1, 6), (1, 3)]
    kept = torch.cat([keep for _, keep in shared(batch, start, 1 << 10)])
    assert sorted(kept.tolist()) == list(range(len(batch)))


class NoPositions(LlamaForCausalLM):
    """Counts positions itself, whatever it is told."""

    def __init__(self, config):
        super().__init__(config)
        inner = self.model.forward

        def forward(*args, position_ids=None, **kwargs):
            return inner(*args, **kwargs)

        self.model.forward = forward


def test_models_that_cannot_share_a_prompt_are_told_apart(model):
    ids = torch.arange(1, 30)
    torch.manual_seed(0)
    assert shares_prompts(find_readout(model, ids), ids)
    assert not shares_prompts(find_readout(model, ids), ids[:5])
    assert not shares_prompts(find_readout(NoPositions(model.config).eval(), ids), ids)
    window = MistralForCausalLM(MistralConfig(sliding_window=4, **SHAPE, **HEADS)).eval()
    assert not shares_prompts(find_readout(window, ids), ids)
    shape = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    wide = GPTNeoForCausalLM(GPTNeoConfig(window_size=32, attention_types=[[["global", "local"], 1]], **shape)).eval()
    assert not shares_prompts(find_readout(wide, ids), ids), "its window is longer than the trial"


def test_a_vector_in_a_file_is_the_vector(tmp_path):
    before = set(tmp_path.iterdir())
    x = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(()).double(), "d": torch.zeros(0, 2)}
    filed = Filed(x, tmp_path)
    assert list(filed) == list(x) and set(tmp_path.iterdir()) == before, "the file has no name"
    for name, value in x.items():
        assert filed[name].dtype == value.dtype and torch.equal(filed[name], value)
    filed["a"].zero_()
    assert torch.equal(filed["a"], x["a"]), "what is read is a copy to its reader"


def test_a_matrix_in_a_file_is_written_and_read_in_parts(tmp_path):
    """Zeros where nothing was written; what is kept in bfloat16 is read in float32."""
    known = torch.zeros(4, 10)
    filed = {dtype: FiledMatrix((4, 10), dtype, tmp_path, known.device) for dtype in (torch.float32, torch.bfloat16)}
    for rows, columns in (([2, 0], slice(3, 7)), ([1], slice(7, 10)), ([2], slice(0, 3))):
        values = torch.randn(len(rows), columns.stop - columns.start)
        known[rows, columns] = values
        for matrix in filed.values():
            matrix[torch.tensor(rows), columns] = values
    for columns in (slice(0, 10), slice(2, 8), slice(8, 20), slice(None)):
        assert torch.equal(filed[torch.float32][:, columns], known[:, columns])
        assert torch.equal(filed[torch.bfloat16][:, columns], known.bfloat16().float()[:, columns])
    assert len(filed[torch.float32]) == 4 and not list(tmp_path.iterdir())


def test_a_vector_with_a_name_is_found_when_it_is_whole(tmp_path):
    vector = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.ones(0, 2)}
    assert Filed.found(tmp_path, "step") is None
    Filed(vector, tmp_path, "step")
    found = Filed.found(tmp_path, "step")
    assert list(found) == list(vector) and all(torch.equal(found[name], x) for name, x in vector.items())
    assert all(found[name].dtype == x.dtype for name, x in vector.items())
    (tmp_path / "step.vector.json").unlink()
    assert Filed.found(tmp_path, "step") is None, "its writer was killed before it was whole"
    forget(tmp_path, "step")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    class Full:
        tell, seek, close, flush, truncate = (lambda self, *_: 0,) * 5

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(vectors.tempfile, "TemporaryFile", lambda dir: Full())
    for make in (
        lambda: Filed({"a": torch.ones(3)}, tmp_path),
        lambda: FiledMatrix((1, 3), torch.float32, tmp_path, torch.device("cpu")),
    ):
        with pytest.raises(
            OSError, match=r"as the model are kept in files there meanwhile: No space.*" + tmp_path.name
        ):
            found = make()
            found[torch.tensor([0]), slice(0, 3)] = torch.ones(1, 3)


def test_moments_in_a_file_are_the_moments(tmp_path):
    rules = {"a": Rule("adamw", 0.1), "b": Rule("sgd", 0.1)}
    moments = {"a": Moments(3, torch.randn(4), torch.rand(4)), "b": Moments(2)}
    found = OptimizerState(rules, moments).filed(tmp_path).moments
    assert list(found) == ["a", "b"] and found["b"] == moments["b"] and found["a"].step == 3
    assert torch.equal(found["a"].second, moments["a"].second) and found["a"].largest is None


def test_products_in_float32_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3_000_000, generator=generator) for _ in range(2))
    exact = [float(x.double() @ x.double()), float(x.double() @ y.double())]
    found = dots(x, [x, y])
    assert abs(found[0] - exact[0]) < 1e-6 * exact[0] and found[0] > 0
    assert abs(found[1] - exact[1]) < 1e-7 * exact[0], "next to the product of the lengths"


def test_a_sweep_holds_two_entries_and_makes_one_pass_for_a_prompt(model, weights, monkeypatch, tmp_path):
    """However many directions there are: each is in a file, is made once, and no more than one of its entries is
    mapped.
    """
    large(monkeypatch)
    both = Passes(model, PROMPTS, COMPLETIONS, scratch=tmp_path)
    groups = [torch.tensor([k == q for k in (0, 0, 0, 1, 1, 2)]) for q in range(3)]
    made, num = [], 13
    directions = [
        Derived(both.parameters, lambda name, k=k: made.append((k, name)) or torch.ones_like(both.parameters[name]) * k)
        for k in range(num)
    ]
    held = [both.held(u) for u in directions]
    assert len(made) == num * len(both.parameters) and all(both.held(u) is u for u in held)
    assert both.at_once > num
    backward = []
    run = Passes._backward
    monkeypatch.setattr(Passes, "_backward", lambda self, *args: backward.append(1) or run(self, *args))
    found = both.products([weights], groups, held)
    assert len(backward) == 3 and len(made) == num * len(both.parameters)
    torch.testing.assert_close(found[2], 2 * found[1], rtol=1e-6, atol=1e-9)


def test_the_forecast_lets_as_many_share_a_prompt_as_fit_in_a_row(monkeypatch):
    from types import SimpleNamespace

    from tokencredit.studies import forecast

    large(monkeypatch)
    monkeypatch.setattr(forecast, "shares_prompts", lambda *_: True)
    monkeypatch.setattr(forecast, "find_readout", lambda *_: None)
    tiny = SimpleNamespace(model=LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)), max_new_tokens=100)
    together = [forecast._together(tiny, range(length)) for length in (12, 112, 412, 600)]
    assert together == [5, 4, 1, 1]


def test_the_forecast_counts_what_rollouts_share_and_what_each_takes_alone(monkeypatch):
    """By hand: of 3 prompts of 10 tokens 4 rollouts of 48, two of which share a prompt."""
    from tokencredit.dynamics.checkpoint import open_checkpoint
    from tokencredit.studies import forecast

    monkeypatch.setattr(forecast, "_together", lambda *_: 2)
    parts = [forecast.Drawn(3, 4, passes=2, alone=5)]
    told = forecast.forecast(open_checkpoint("reckon"), parts, 2, range(1, 11), disk=2 << 30)
    assert f"{3 * 2 * (2 * 10 + 4 * 48) + 12 * 5 * (10 + 48):,} tokens of forward passes" in told
    assert "and 2 GiB of disk" in told


@pytest.fixture(scope="module")
def small_study():
    from tokencredit.studies.attribution.question import AttributeConfig

    sizes = {"prompts": 6, "group": 4, "entropy": (5, 2), "reward": (6, 4), "trees": 0, "bootstraps": 50}
    return AttributeConfig(methods=("grpo", "gtpo", "kl_cov"), optimizer="adamw", **sizes)


def test_attribution_of_a_large_model_is_that_of_a_small_one(small_study, tmp_path, monkeypatch):
    """Every figure, the model called small and large: two sweeps over the goals' prompts answer all questions, one for
    either goal, and the files are gone with them. Killed and begun again, it ends with the same numbers.
    """
    from tokencredit.studies.attribution.question import STUDY

    known = STUDY.run(small_study, tmp_path / "small")["figures"]
    large(monkeypatch)
    swept, run = [], Passes.products
    monkeypatch.setattr(Passes, "products", lambda self, *args: swept.append(len(args[2])) or run(self, *args))
    told = []
    out = tmp_path / "large"
    found = STUDY.run(small_study, out, tell=told.append)["figures"]
    assert "of disk" in told[0]
    assert len({num for num in swept if num > 2}) == 1 and len([num for num in swept if num > 2]) == 2
    assert found.keys() == known.keys()
    for name, figure in known.items():
        if name.split("/")[0] in ("change", "method", "without") and "minus" not in name:
            scale = abs(figure.value) + abs(figure.high - figure.low)
            assert found[name].value == pytest.approx(figure.value, rel=2e-2, abs=2e-3 * scale), name
    assert not [path for path in out.iterdir() if path.name.startswith("tmp")]
    assert not [path for path in (out / "stages").iterdir() if "sweep" in path.name]
    (out / "result.json").unlink()
    (out / "stages" / "fewer_0.npz").unlink()
    again = STUDY.run(small_study, out)["figures"]
    assert {name: each.value for name, each in again.items()} == {name: each.value for name, each in found.items()}


def test_a_sweep_that_is_cut_goes_on_at_its_prompt(small_study, tmp_path, monkeypatch):
    """Cut after a prompt of the second goal, cut again between the prompts of an answer: it sweeps what was left, makes
    no gradient and samples no rollout again, ends with the figures of a study that was not cut, and leaves no file.
    """
    from cuts import Cut
    from tokencredit.dynamics import sweep
    from tokencredit.lm.policy import Policy
    from tokencredit.studies.attribution.question import STUDY

    large(monkeypatch)
    whole = STUDY.run(small_study, tmp_path / "whole")["figures"]
    monkeypatch.setattr(sweep, "EVERY", 0.0)
    monkeypatch.setattr(sweep, "WORTH", 0.0)
    out, told, swept, drawn, passes = tmp_path / "cut", [], [], [], []
    heard, complete, backward = Sweep.heard, Policy.complete, Passes._backward
    cuts = [("sweep_reward", 2), ("sweep_method_1", 3)]

    def listening(self, done, *sums):
        heard(self, done, *sums)
        swept.append((self.path.stem, done))
        if swept[-1] in cuts:
            cuts.remove(swept[-1])
            raise Cut

    monkeypatch.setattr(Sweep, "heard", listening)
    monkeypatch.setattr(Policy, "complete", lambda *args, **options: drawn.append(1) or complete(*args, **options))
    monkeypatch.setattr(Passes, "_backward", lambda *args: passes.append(1) or backward(*args))
    with pytest.raises(Cut):
        STUDY.run(small_study, out)
    assert len(drawn) == 3 and swept == [
        *(("sweep_entropy", n) for n in range(1, 6)),
        *(("sweep_reward", n) for n in range(1, 3)),
    ]
    swept.clear(), passes.clear()
    with pytest.raises(Cut):
        STUDY.run(small_study, out, say=told.append)
    assert swept == [*(("sweep_reward", n) for n in range(3, 7)), *(("sweep_method_1", n) for n in range(1, 4))]
    assert len(passes) <= len(swept), "the gradients of the step and of all questions were there"
    assert any("reward: 2 of 4 prompts" in text for text in told)
    swept.clear(), passes.clear()
    found = STUDY.run(small_study, out)["figures"]
    assert swept[0] == ("sweep_method_1", 4) and {name for name, _ in swept} == {"sweep_method_1", "sweep_method_2"}
    assert len(passes) <= len(swept) + 1 and len(drawn) == 3, "the attribution's answer is stored, its gradient gone"
    assert {name: each.value for name, each in found.items()} == {name: each.value for name, each in whole.items()}
    left = [path for folder in (out, out / "stages") for path in folder.iterdir()]
    assert not [path for path in left if "sweep" in path.name or "vector" in path.name]


def test_what_a_sweep_of_other_directions_left_is_not_used(tmp_path, monkeypatch):
    from tokencredit.dynamics import sweep

    monkeypatch.setattr(sweep, "EVERY", 0.0)
    monkeypatch.setattr(sweep, "WORTH", 0.0)
    path, products = tmp_path / "sweep.npz", torch.arange(6.0, dtype=torch.float64).view(2, 3)
    Sweep(path, ["a", "b"]).heard(2, products, [{"w": torch.ones(2)}])
    found, sums = torch.zeros(1, 3, dtype=torch.float64), [{"w": torch.zeros(2)}]
    assert Sweep(path, ["c"]).begin(3, found, sums) == 0 and not found.any()
    assert Sweep(path, ["b"]).begin(3, found, [{"other": torch.zeros(2)}]) == 0 and not found.any()
    assert Sweep(path, ["b"]).begin(3, found, sums, at_once=1) == 0 and not found.any(), (
        "in other times over the groups"
    )
    assert Sweep(path, ["b"]).begin(3, found, sums) == 2
    assert torch.equal(found, products[1:]) and torch.equal(sums[0]["w"], torch.ones(2))
