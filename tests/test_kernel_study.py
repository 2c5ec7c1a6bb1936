"""The kernel study from the command line, its files, and its page in a real browser."""

import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest

from tokencredit import limits
from tokencredit.cli import main
from tokencredit.dynamics import vectors
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.kernel import sequence_features
from tokencredit.dynamics.vectors import norm
from tokencredit.studies.kernel.measurement import _Kernels, step_of
from tokencredit.studies.kernel.question import STUDY, KernelConfig
from tokencredit.studies.kernel.ties import strongest

SMALL = [
    "dynamics",
    "kernel",
    "--run",
    "reckon",
    "--prompts",
    "8",
    "--group",
    "4",
    "--held-out",
    "4",
    "--samples",
    "1",
    "--seed",
    "1",
]


def study(out, *more):
    assert main([*SMALL, "--out", str(out), *more]) == 0
    return json.loads((out / "result.json").read_text())


def value(result, name):
    return result["figures"][name]["value"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "kernel"
    return out, study(out, "--optimizer", "adamw")


def test_tokens_exactly(tokens):
    """A fresh AdamW's first step is a sign step: at small rates its influence is as predicted, and at ten times the
    rate it is not.
    """
    out, result = tokens
    assert (
        value(result, "influence/r2/0.03") > 0.99 > value(result, "influence/r2/10")
        and value(result, "influence/kernel_gap") < 1e-3
    )
    parts = [name for name in result["shares"] if name.startswith("share/") and name.count("/") == 1]
    assert len(parts) == 4 and sum(value(result, result["shares"][name]) for name in parts) == pytest.approx(1)
    senders, held = (parquet.read_table(out / f"{name}.parquet").to_pylist() for name in ("senders", "held_out"))
    assert len(senders) == result["num"]["senders"] and len(held) == result["num"]["held_out"]
    each = senders[0]
    assert each["total"] == pytest.approx(
        sum(each[name] for name in ("own", "same completion", "same prompt", "other prompts"))
    )
    own = np.array([row["own"] for row in senders])
    assert ((own > 0) == (np.array([row["coefficient"] for row in senders]) < 0)).all(), (
        "its own term moves a token as its credit says"
    )
    assert all(len(row["real"]) == len(result["config"]["factors"]) for row in held)
    pairs = parquet.read_table(out / "pairs.parquet").to_pylist()
    assert {row["scope"] for row in pairs} == {"same completion", "same prompt", "other prompts"}
    named_ties(out, result)
    figure = result["figures"]["influence/r2/1"]
    assert (
        {"value", "low", "high", "unit", "seed", "command"} <= figure.keys()
        and figure["seed"] == 1
        and "kernel" in figure["command"]
    )


def named_ties(out, result):
    """Every pair of completions once, of the scope that it is said to be, by ids that make its text; its cosine is that
    of the summed kernel.
    """
    ties = parquet.read_table(out / "ties.parquet").to_pylist()
    assert ties == result["ties"] and len({(t["rollout_a"], t["rollout_b"]) for t in ties}) == len(ties)
    with np.load(out / "stages" / "kernel.npz") as kept:
        kernel, row = kept["kernel"], kept["row"]
    for tie in ties:
        assert (tie["scope"] == "same prompt") == (tie["prompt_a"] == tie["prompt_b"])
        assert (tie["prompt_ids_a"] == tie["prompt_ids_b"]) == (tie["scope"] == "same prompt")
        a, b = (row == tie[f"rollout_{side}"] for side in "ab")
        products = [float(kernel[np.ix_(x, y)].sum()) for x, y in ((a, b), (a, a), (b, b))]
        assert tie["cosine"] == pytest.approx(products[0] / np.sqrt(products[1] * products[2]), abs=1e-5)
        assert tie["completion_text_a"].split() and len(tie["completion_ids_b"]) == int(b.sum())


def test_the_strongest_ties_by_hand():
    cosine = np.array([[1, 0.9, -0.2, 0.1], [0.9, 1, 0.3, -0.4], [-0.2, 0.3, 1, 0.5], [0.1, -0.4, 0.5, 1]])
    found = strongest(cosine, np.array([0, 0, 1, 1]), 1)
    within = [(0, 1, 0.9, "same prompt"), (2, 3, 0.5, "same prompt")]
    assert found == [*within, (1, 2, 0.3, "other prompts"), (1, 3, -0.4, "other prompts")]
    assert len(strongest(cosine, np.array([0, 0, 1, 1]), 50)) == 6


def test_it_goes_on_where_it_was_with_the_same_numbers(tokens, tmp_path):
    out, result = tokens
    again = tmp_path / "kernel"
    shutil.copytree(out, again)
    (again / "result.json").unlink()
    stamp = (again / "stages" / "kernel.npz").stat().st_mtime_ns
    found = study(again, "--optimizer", "adamw")

    def same(figures):
        return {name: {k: v for k, v in figure.items() if k != "command"} for name, figure in figures.items()}

    assert (
        same(found["figures"]) == same(result["figures"])
        and (again / "stages" / "kernel.npz").stat().st_mtime_ns == stamp
    )


def test_completions_under_the_identity(tmp_path):
    result = study(tmp_path / "kernel", "--sequences", "--preconditioner", "identity")
    assert value(result, "influence/r2/0.03") > 0.99 and value(result, "influence/kernel_gap") < 1e-3
    assert result["num"]["senders"] == result["num"]["rollouts"] and set(result["heat"]) == {"completions"}
    assert "share/same completion" not in result["shares"]
    checkpoint = open_checkpoint("reckon")
    update, preconditioner = step_of(checkpoint, draw(checkpoint, 8, 4, 1), "identity")
    rate = checkpoint.config.learning_rate
    assert norm(update.vector) == pytest.approx(rate * result["num"]["parameters"] ** 0.5), "as long as a sign step"
    assert preconditioner.fresh == pytest.approx(result["lr"]) and update.lr == pytest.approx(result["lr"])


def test_a_large_model_is_asked_with_files(tmp_path, monkeypatch):
    """The model called large: the gradients and what else is as large are in files, without a name and gone with the
    study; every figure is that of the small model. A method that weighs the tokens of a completion differently.
    """
    sizes = {"prompts": 8, "group": 4, "held_out": 4, "samples": 1, "seed": 1, "optimizer": "adamw"}
    config = KernelConfig(level="sequences", method="gtpo", **sizes)
    known = STUDY.run(config, tmp_path / "small")["figures"]
    monkeypatch.setattr(vectors, "FINE", 0)
    monkeypatch.setitem(sequence_features.__kwdefaults__, "limit", 0)
    told, said, made, write = [], [], [], vectors.FiledMatrix.__init__
    monkeypatch.setattr(
        vectors.FiledMatrix, "__init__", lambda self, shape, *args: made.append(shape) or write(self, shape, *args)
    )
    found = STUDY.run(config, tmp_path / "large", tell=told.append, say=said.append)
    parameters, num = found["num"]["parameters"], found["num"]
    assert made == [(num["senders"], parameters)] * 2 + [(num["held_out"], parameters)]
    assert told[0].startswith("forecast: 36 rollouts") and "of disk" in told[0]
    assert any(x.startswith("sampling the step: 32 of 32 rollouts") for x in said)
    assert any(x.startswith("sampling held-out completions: 4 of 4 rollouts") for x in said)
    assert any(x.startswith(f"gradients of completions: {2 * num['senders']} of") for x in said)
    assert not [path for path in (tmp_path / "large").rglob("tmp*")]
    assert found["figures"]["influence/kernel_gap"].value < 0.05, "of so few parameters bfloat16 is felt"
    for name in known.keys() - {"influence/kernel_gap"}:
        assert found["figures"][name].value == pytest.approx(known[name].value, rel=0.02, abs=2e-3), name


def test_what_is_sent_is_the_completion_where_its_tokens_are_alike(tmp_path):
    """GRPO weighs the tokens of a completion alike: one gradient serves, with its κ; two give the same."""
    checkpoint = open_checkpoint("reckon").fresh("adamw")
    update, preconditioner = step_of(checkpoint, draw(checkpoint, 8, 4, 1), "adamw")
    asked = _Kernels(KernelConfig(level="sequences"), preconditioner, tmp_path, lambda _: None)
    rows = (update.coefficient != 0).any(1, keepdim=True) & update.batch.rollouts.mask
    sender, sent, coefficient = asked._senders(update, rows)
    assert sent is sender and len(coefficient.unique()) > 1
    weighted = sequence_features(update.passes, preconditioner, update.coefficient).matrix.double()
    gap = weighted - sent.matrix.double() * coefficient[:, None]
    assert (gap.norm(dim=1) < 1e-5 * weighted.norm(dim=1)).all()


def test_what_finds_no_disk_is_refused_before_a_rollout(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "FINE", 0)
    monkeypatch.setattr(limits, "free", lambda folder: 1 << 20)
    monkeypatch.setattr("tokencredit.studies.kernel.measurement.drawn", None)
    config = KernelConfig(prompts=8, group=4, held_out=4, samples=1, level="tokens", optimizer="adamw")
    with pytest.raises(ValueError, match=r"--prompts 8 --group 4 --held-out 4 .*--sequences.*--directions 512.*--out"):
        STUDY.run(config, tmp_path / "kernel")
    assert not (tmp_path / "kernel").exists()


def test_sizes_follow_the_model_and_the_task():
    """Tokens of a small model; fewer completions of a large one; what is named stays."""
    small = KernelConfig().fitted(108_544, (None, None), 48, 434_176)
    assert (small.prompts, small.group, small.held_out, small.level) == (64, 8, 32, "tokens")
    large = KernelConfig().fitted(134_515_008, (500, 5), 32, 269_030_016)
    assert (large.prompts, large.group, large.held_out, large.level) == (8, 8, 5, "sequences")
    named = KernelConfig(prompts=20, group=6, held_out=9, level="tokens").fitted(134_515_008, (500, 5), 32, 269_030_016)
    assert (named.prompts, named.group, named.held_out, named.level) == (20, 6, 9, "tokens")
    for wrong in ({"held_out": 0}, {"prompts": 0}, {"directions": -1}):
        with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
            KernelConfig(**wrong)


def test_a_sketch_says_its_noise_and_makes_no_claim_on_shares(tmp_path, capsys):
    result = study(tmp_path / "kernel", "--directions", "4", "--optimizer", "adamw")
    assert value(result, "noise") == 0.5 and result["shares"] == {} and "within ± 0.500" in " ".join(result["findings"])
    assert value(result, "influence/r2/0.03") > 0.99, "influence is predicted by forward passes, whatever the sketch"
    assert len(STUDY.sections(tmp_path / "kernel")) == 6


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "a")]) == 1
    assert main(["dynamics", "kernel", "--out", str(tmp_path / "b")]) == 1
    assert main([*SMALL, "--out", str(tmp_path / "c"), "--optimizer", "sgd"]) == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert "--optimizer adamw" in told and "--run" in told and "--preconditioner identity" in told


def test_the_report_of_runs_shows_it(tokens, tmp_path):
    out, _ = tokens
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    assert "What a token’s own term makes" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def page_path(tokens, tmp_path_factory):
    """The page of the study with hostile tokens in it."""
    folder = tmp_path_factory.mktemp("page")
    result = json.loads(json.dumps(tokens[1]))
    result["heat"]["tokens"]["names"][0] = "<img src=x onerror=alert(1)>"
    result["findings"].append("<u>found</u>")
    (folder / "result.json").write_text(json.dumps(result))
    return STUDY.write_page(folder)


def test_the_page_draws_every_section(opened, tokens):
    _, result = tokens
    assert opened.locator("main h2").all_text_contents() == [
        "Who moves whom",
        "Predicted and real changes",
        "What a token’s own term makes",
        "Which gradients are alike",
        "Which completions are tied together",
        "Cosines one by one",
        "Spectrum",
    ]
    assert opened.locator("main u, main img").count() == 0
    influence = opened.locator("#predicted-and-real-changes")
    assert influence.locator("circle.point").count() == min(result["num"]["held_out"], 400)
    influence.get_by_label("Learning rate", exact=True).select_option("0")
    influence.locator("circle.point").first.hover(force=True)
    assert influence.locator("[role=status]").text_content().startswith("predicted ")
    matrix = opened.locator("#cosines-one-by-one")
    count = len(result["heat"]["tokens"]["names"])
    assert matrix.locator("rect").count() == count**2
    matrix.locator("rect").first.hover(force=True)
    assert (
        matrix.locator("[role=status]").text_content()
        == "<img src=x onerror=alert(1)> · <img src=x onerror=alert(1)>: 1"
    )
    matrix.get_by_label("Between", exact=True).select_option("completions")
    assert matrix.locator("rect").count() == len(result["heat"]["completions"]["names"]) ** 2
    assert opened.locator("#spectrum circle.dot").count() == 64


def test_it_fits_a_narrow_screen(opened):
    opened.set_viewport_size({"width": 400, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
