"""What a learned credit model knows of tokens that it has not seen, on the embedded world, where the truth is known.

    python benchmarks/credit_model.py [--prompts 200] [--held-out 48] [--rollouts 8] [--later 20] [--work DIR]

Labels are a pivotality run of train prompts by the shipped model; the truth is that of `tokencredit world truth` on
test prompts. A later policy is one that GRPO has trained for 20 steps since, which the credit model is applied to as it
is: its effects are measured with 32 rollouts per token, and estimate² − se² stands for their squares. `captured` is the
share of Σ (Q − V)² in the fifth of the tokens that a score puts first, `precision` its average precision at
|Q − V| ≥ 0.2; differences are of the same draws of prompts, with Holm's correction over the scores. Budgets: the same
completions measured with a fixed number of rollouts per token, and with as many, or fewer, that predicted sizes have
spread (`pivotality run --sizes`), at the tokens that each sampled. Intervals are by prompt.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from _result import finish
from tokencredit.agreement.ranks import average_precision, share_of_top
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.cli import main as tokencredit
from tokencredit.credit_model.model import CreditModel, same_prompts
from tokencredit.durable import read_rows
from tokencredit.figure import Figure
from tokencredit.scores.table import SCORES
from tokencredit.truth.estimates import read_estimates
from tokencredit.truth.judge import PIVOTAL, TOP, KnownTruth

PROXIES = (
    *("surprisal", "entropy", "varentropy", "margin", "sum_p2", "head_norm", "last_block_norm", "gradient_norm"),
    *("fisher_trace", "perturbation_variance", "attention", "uniform"),
)
FILES = (("truth", ""), ("scores", ".parquet"), ("learned", ".parquet"))
FIXED, SIZED = (2, 3, 4, 8), (2, 3)


def call(out, *words):
    """A command of tokencredit, unless what it writes is there."""
    if not out.exists() and tokencredit([str(word) for word in words]):
        raise SystemExit(f"tokencredit {' '.join(map(str, words))} failed")


class Measured:
    """Q − V of tokens by many rollouts, where no truth is at hand: `square` is unbiased for its square."""

    def __init__(self, folder):
        rows = read_rows(folder / "tokens.parquet")
        traces = read_rows(folder / "traces.parquet")
        names = [json.dumps(row["prompt_ids"]) for row in traces]
        number = {name: k for k, name in enumerate(dict.fromkeys(names))}
        self.places = [(row["trace"], row["position"]) for row in rows]
        self.prompt = np.array([number[names[row["trace"]]] for row in rows])
        effect, error = (
            np.nan_to_num(np.array([row[name] for row in rows], float))
            for name in ("before_after", "before_after_standard_error")
        )
        self.effect, self.square = effect, effect**2 - error**2


class Known:
    """The same from a truth."""

    def __init__(self, folder):
        truth = KnownTruth.read(folder)
        self.places, self.prompt, self.effect = truth.places, truth.prompt, truth.known["before_after"]
        self.square = self.effect**2


def columns_of(places, *files):
    """{name: [N]} of the columns of the files, larger for a token that stands out."""
    found = {}
    for file in files:
        for name, values in read_estimates(file, places).values.items():
            falling = name == "sum_p2" or (name in SCORES and SCORES[name].falling)
            found[name] = -values if falling else values
    return found


def ranking(bootstrap, known, scores, against):
    """Captured share and, of a truth, precision of every score, and `against` less each of the others."""
    sizes = {name: np.where(np.isfinite(x), x, np.nanmin(x) - 1) for name, x in scores.items()}
    draws = {
        "captured": {
            name: share_of_top(x, known.square, TOP, bootstrap.weights, per_token=False) for name, x in sizes.items()
        }
    }
    if isinstance(known, Known):
        pivotal = (np.abs(known.effect) >= PIVOTAL).astype(float)
        draws["precision"] = {name: average_precision(x, pivotal, bootstrap.weights) for name, x in sizes.items()}
    found = {}
    for measure, each in draws.items():
        found |= {f"{measure}/{name}": Figure.of(bootstrap.estimate(x), "share").as_json() for name, x in each.items()}
        for name, of in compare(bootstrap, {key: -x for key, x in each.items()}, against).items():
            more = {"p": of["p"], "holm": of["holm"]}
            found[f"{measure}/{against} less {name}"] = Figure.of(of["difference"], "share", more=more).as_json()
    return found


def held_out(known, scores, learned):
    """Everything about one policy: rankings, and whether sizes and credits are right on average."""
    found = columns_of(known.places, scores, learned)
    bootstrap = Bootstrap(known.prompt)
    size, credit, effect, square = found["learned_size"], found["learned_credit"], known.effect, known.square
    columns = {name: found[name] for name in PROXIES} | {"learned_size": size, "|learned_credit|": np.abs(credit)}
    figures = ranking(bootstrap, known, columns, "learned_size")
    sums = bootstrap.sums(np.stack([square, size**2, credit * effect, credit**2], 1))
    figures["calibration"] = Figure.of(bootstrap.estimate(sums[:, 0] / sums[:, 1]), "1").as_json()
    cosine = sums[:, 2] / np.sqrt(np.maximum(sums[:, 0], 1e-12) * sums[:, 3])
    figures["alignment"] = Figure.of(bootstrap.estimate(cosine), "cosine").as_json()
    return figures, {"tokens": len(effect), "prompts": bootstrap.num_clusters}


def budgets(truth, learned, work, reference):
    """Precision and captured share of every budget, and of the learned size alone, at the tokens that each sampled."""
    columns, spent = {}, {}
    runs = {f"fixed, {n}": ("--rollouts", n) for n in FIXED}
    runs |= {f"sized, {n}": ("--rollouts", n, "--sizes", learned) for n in SIZED}
    for name, words in runs.items():
        out = work / name.replace(", ", "_")
        call(out / "result.json", "pivotality", "run", "--traces", truth, *words, "--out", out)
        known = Known(truth)
        found = columns_of(known.places, out)
        columns[name] = np.abs(found["before_after"])
        spent[name] = json.loads((out / "result.json").read_text())["figures"]["generated"]["value"]
        if "--sizes" in words:
            columns[f"{name}, given sizes"] = np.abs(found["given_size"])
    return ranking(Bootstrap(known.prompt), known, columns, reference), spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=8, help="per token of the labels")
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--later", type=int, default=20, help="steps of GRPO until the later policy")
    parser.add_argument("--many", type=int, default=32, help="rollouts per token of the later policy")
    parser.add_argument("--work", type=Path, help="where runs are kept; what is there is not made again")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = o.work or Path(folder)
        labels, model, later = work / "labels", work / "credit_model", work / "later"
        made = ("--prompts", o.prompts, "--samples", o.samples, "--rollouts", o.rollouts, "--out", labels)
        call(labels / "result.json", "pivotality", "run", "--split", "train", *made)
        call(model, "credit-model", "fit", labels, "--out", model)
        call(later / "result.json", "train", "--method", "grpo", "--steps", o.later, "--out", later)
        result = {}
        for name, policy in (("same policy", ()), ("later policy", ("--model", later))):
            suffix = "_later" if policy else ""
            truth, scores, learned = (work / f"{each}{suffix}{end}" for each, end in FILES)
            drawn = ("--prompts", o.held_out, "--samples", o.samples, "--out", truth, *policy)
            if policy:
                many = ("--split", "test", "--rollouts", o.many)
                call(truth / "result.json", "pivotality", "run", *many, *drawn)
            else:
                call(truth / "truth.json", "world", "truth", "--no-gradients", *drawn)
            asked = ("--data", truth / "traces.parquet", "--scores", *PROXIES, "--out", scores)
            call(scores, "score", *asked, *policy)
            call(learned, "credit-model", "predict", model, "--traces", truth, "--out", learned, *policy)
            known = Measured(truth) if policy else Known(truth)
            result[name], result[f"{name}, counts"] = held_out(known, scores, learned)
        result["same policy, counts"]["pivotal"] = int((np.abs(Known(work / "truth").effect) >= PIVOTAL).sum())
        truth, learned = work / "truth", work / "learned.parquet"
        best = f"sized, {SIZED[-1]}, given sizes"
        result["budgets"], result["spent"] = budgets(truth, learned, work, best)
        card = CreditModel.load(model).card
        prompts = [json.dumps(row["prompt_ids"]) for row in read_rows(truth / "traces.parquet")]
        result["labels"] = {name: card[name] for name in ("prompts", "tokens", "tokens_spent_on_labels")}
        result["labels"]["prompts_seen"] = same_prompts(card, prompts)
    settings = {name: value for name, value in vars(o).items() if name != "work"}
    finish("credit_model", result | {"settings": settings})


if __name__ == "__main__":
    main()
