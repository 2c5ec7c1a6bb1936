"""Work on Ray, really run: two workers and one process give the same bits, whoever is killed, and what fails is named.

One cluster for the module, with more processors than there are: workers wait for each other no longer than they must.
"""

import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from tokencredit.cli import main, make_parser
from tokencredit.distribute import pool as pools
from tokencredit.distribute.cluster import connected, import_ray, share
from tokencredit.distribute.host import HostSpec
from tokencredit.distribute.lost import Lost
from tokencredit.distribute.pool import Alone, Pool
from tokencredit.distribute.site import Site, WrongWorker
from tokencredit.distribute.workers import Workers
from tokencredit.lm.load import load_model, resolve_model
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.away import Away, crew_of
from tokencredit.pivotality.budgets import Fixed, TwoStage
from tokencredit.pivotality.crew import Here
from tokencredit.pivotality.measure import measure, measure_with
from tokencredit.pivotality.store import RolloutStore
from tokencredit.scores import command as score_command
from tokencredit.stages import Stages
from tokencredit.studies.book import Book
from tokencredit.studies.correlation import study as correlation
from tokencredit.studies.correlation.question import CorrelationConfig
from tokencredit.studies.remote import Remote
from tokencredit.studies.study import Work
from tokencredit.tasks.verdict import VerifierError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokencredit[ray]'")

LIMIT = 30
CONFIG = PolicyConfig(max_new_tokens=LIMIT).settled()
SPEC = HostSpec(CONFIG.as_dict())


@pytest.fixture(scope="module")
def cluster():
    """Functions of this module are sent as they are: no worker can import it. Workers are as nice as this process,
    where Ray would have them wait for whatever else the machine does.
    """
    os.environ.update(RAY_worker_niceness="0")
    with connected("local", 4) as found:
        found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield found


@pytest.fixture(scope="module")
def workers(cluster):
    with pools.pool(SPEC, "local", 2) as found:
        yield found


@pytest.fixture(scope="module")
def alone():
    return Alone(SPEC)


@pytest.fixture(scope="module")
def traces(alone):
    """(rows, traces): three completions of each of three prompts."""
    rows = [row for row in alone.policy.task.rows("train", 3, 0) for _ in range(3)]
    prompts = alone.policy.encode_rows(rows[::3])
    drawn = alone.policy.complete(prompts, 3, seed=0)
    return rows, [Trace(tuple(p), c.ids) for p, group in zip(prompts, drawn) for c in group]


def measured(crew, traces, folder, budget, progress=None):
    """(estimates as bytes by trace, failed) of a measurement in many small parts."""
    store = RolloutStore(folder, {"of": "a test"}, part=40)
    options = {"budget": budget, "max_new_tokens": LIMIT, "store": store, "progress": progress}
    found, failed = measure_with(crew, traces, **options)
    return {k: bits(m) for k, m in found.items()}, failed


def bits(m):
    effects = (m.estimate.replace, m.estimate.before_after, m.substitute)
    values = [x for e in effects for x in (e.value, e.standard_error)]
    return b"".join(np.asarray(x, float).tobytes() for x in (*values, m.inclusion, m.entropy)), m.rollouts, m.generated


def parts(folder):
    """What every part holds, by name."""
    return {path.name: parquet.read_table(path).to_pydict() for path in (folder / "parts").glob("*.parquet")}


@pytest.fixture(scope="module")
def whole(alone, traces, tmp_path_factory):
    """(estimates, parts) of one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    found, failed = measured(crew_of(alone, alone.policy, traces[0]), traces[1], folder, Fixed(5, skip_below=0.02))
    assert failed == {} and len(found) == 9
    return found, parts(folder)


def process(host):
    return os.getpid()


def processes(workers):
    """The numbers of the workers' processes."""
    return set(workers.ray.get([w.do.remote(workers.facts.model_hash, process, ()) for w in workers.workers]))


# The same bits.


def test_two_workers_are_one_process(workers, traces, whole, tmp_path):
    assert len(processes(workers)) == 2 and os.getpid() not in processes(workers)
    found, failed = measured(
        crew_of(workers, workers.policy, traces[0]), traces[1], tmp_path, Fixed(5, skip_below=0.02)
    )
    assert failed == {} and found == whole[0] and parts(tmp_path) == whole[1] and len(whole[1]) > 6


def test_two_stages_on_two_workers_are_those_of_one_process(workers, alone, traces, tmp_path):
    budget = TwoStage(4, 12, select=0.2)
    one = measured(crew_of(alone, alone.policy, traces[0]), traces[1], tmp_path / "one", budget)
    told = []
    crew = crew_of(workers, workers.policy, traces[0])
    two = measured(crew, traces[1], tmp_path / "two", budget, lambda rows, tokens=0, total=None: told.append(rows))
    assert one == two and one[1] == {} and parts(tmp_path / "one") == parts(tmp_path / "two")
    assert sum(told) == sum(rollouts for _, rollouts, _ in two[0].values())


def test_scores_are_those_of_one_process(workers, alone, tmp_path):
    words = ["score", "--out", "none", "--scores", "entropy", "head_norm", "gradient_norm", "exact_value", "step_gain"]
    args = make_parser().parse_args([*words, "--prompts", "5", "--samples", "2", "--batch", "3"])
    asked = score_command.task_rows(args, alone.policy)
    assert asked == score_command.task_rows(args, workers.policy)
    one, two = (Stages(tmp_path / name) for name in ("one", "two"))
    rows = score_command.sampled(args, alone, asked, one)
    assert rows == score_command.sampled(args, workers, asked, two) and len(rows) == 10
    assert score_command._scores(args, alone, rows, one) == score_command._scores(args, workers, rows, two)


def test_the_correlation_study_is_that_of_one_process(workers, alone, tmp_path):
    small = {"prompts": 9, "rollouts": 8, "bootstraps": 20, "condition_prompts": 4, "condition_samples": 2}
    config = CorrelationConfig(policy=CONFIG, proxies=("entropy", "head_norm"), temperatures=(0.5,), **small)
    found = []
    for name, pool in (("one", alone), ("two", workers)):
        work = Work("correlation", config, tmp_path / name, Book("", 0))
        result = correlation._run(config, work, pool)
        found.append((result["findings"], result["num"], {key: str(each) for key, each in work.book.figures.items()}))
    assert found[0] == found[1]
    one, two = (sorted((tmp_path / name / "stages").glob("*.npz")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) > 5
    for a, b in zip(one, two):
        with np.load(a) as first, np.load(b) as second:
            assert all(np.array_equal(first[key], second[key], equal_nan=True) for key in first.files)


# Who is killed.


def test_a_worker_that_is_killed_is_replaced(workers, traces, whole, tmp_path):
    before, killed = processes(workers), []

    def kill_one(rows, tokens=0, total=None):
        if rows and not killed:
            killed.append(max(before))
            os.kill(killed[0], signal.SIGKILL)

    crew = crew_of(workers, workers.policy, traces[0])
    found, failed = measured(crew, traces[1], tmp_path, Fixed(5, skip_below=0.02), kill_one)
    assert killed and failed == {} and found == whole[0] and parts(tmp_path) == whole[1]
    assert killed[0] not in processes(workers) and len(processes(workers) & before) == 1


COMMAND = ["pivotality", "run", "--prompts", "3", "--samples", "2", "--rollouts", "6", "--max-new-tokens", str(LIMIT)]
KILLED = """
import os, signal, sys
from pathlib import Path
from tokencredit.cli import main
from tokencredit.pivotality.store import RolloutStore

write = RolloutStore._write

def write_and_end(store, *args):
    write(store, *args)
    if len(list((store.path / "parts").glob("*.parquet"))) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

RolloutStore._write = write_and_end
main(sys.argv[1:])
"""


def test_a_command_that_is_killed_goes_on(cluster, tmp_path):
    """Killed by itself when the third part is written, on a cluster that it joined; the rest by workers as well."""
    address = cluster.get_runtime_context().gcs_address
    words = [*COMMAND, "--out", str(tmp_path / "cut")]
    cut = subprocess.run(
        [sys.executable, "-c", KILLED, *words, "--ray", address, "--workers", "1"], capture_output=True, text=True
    )
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "store" / "parts").glob("*.parquet")}
    assert len(kept) == 3 and not (tmp_path / "cut" / "result.json").exists()
    assert main([*words, "--ray", "local", "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main([*COMMAND, "--out", str(tmp_path / "whole")]) == 0
    assert parts(tmp_path / "cut" / "store") == parts(tmp_path / "whole" / "store")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    values = [{key: figure["value"] for key, figure in each["figures"].items()} for each in (one, two)]
    assert values[0] == values[1] and one["identity"] == two["identity"] and two["failed"] == {}
    for name in ("tokens", "traces", "alternatives"):
        tables = [parquet.read_table(tmp_path / run / f"{name}.parquet").to_pydict() for run in ("whole", "cut")]
        assert str(tables[0]) == str(tables[1])


# What fails.


def poisoned(rows, number):
    return [{"prompt": row["prompt"]} if k == number else row for k, row in enumerate(rows)]


@pytest.mark.parametrize("where", ("here", "away"))
def test_a_trace_that_fails_is_a_hole(request, alone, traces, whole, tmp_path, where):
    """The verifier raises on trace 4, which has no answer. The others are what they were; when it is mended, the trace
    is verified, and nothing is sampled again.
    """
    pool = alone if where == "here" else request.getfixturevalue("workers")
    rows, drawn = traces
    budget = Fixed(5, skip_below=0.02)
    found, failed = measured(crew_of(pool, pool.policy, poisoned(rows, 4)), drawn, tmp_path, budget)
    assert list(failed) == [4] and isinstance(failed[4], VerifierError) and "trace 4" in str(failed[4])
    assert found == {k: value for k, value in whole[0].items() if k != 4}
    held = parts(tmp_path)
    assert held.keys() == whole[1].keys() and {name: each["ids"] for name, each in held.items()} == {
        name: each["ids"] for name, each in whole[1].items()
    }
    without = [each for each in held.values() if None in each["reward"]]
    assert without and all(
        (reward is None) == (reason == "error")
        for each in held.values()
        for reward, reason in zip(each["reward"], each["reason"])
    )
    mended = Here(alone.host.sampler, lambda k, ids, cut: alone.policy.verdict(ids, rows[k], cut))
    mended.sampler = Mute(alone.host.sampler)
    found, failed = measured(mended, drawn, tmp_path, budget)
    assert failed == {} and found == whole[0] and parts(tmp_path) == whole[1]


class Mute:
    """A sampler that cannot sample."""

    def __init__(self, sampler):
        self.settings, self.ends, self.distributions = sampler.settings, sampler.ends, sampler.distributions


def test_the_command_names_a_trace_that_failed(tmp_path, capsys, monkeypatch):
    """It is left out of the tables, and the exit code is 1; where all fail, nothing is left to write."""
    (tmp_path / "verify.py").write_text(
        "def check(completion, row):\n"
        "    if row['answer'] == '2':\n        raise KeyError('points')\n"
        "    return completion.split()[-1:] == [row['answer']]\n"
    )
    lines = [{"prompt": f"<bos> {a} + 1 =", "answer": str(a + 1)} for a in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = ["--task", f"{tmp_path}/verify.py:check", "--option", f"path={tmp_path}/data.jsonl", "--max-new-tokens", "4"]
    words = ["pivotality", "run", "--out", str(tmp_path / "run"), "--prompts", "4", "--samples", "1", "--rollouts", "2"]
    assert main([*words, *task, "--option", "test=" + str(tmp_path / "data.jsonl")]) == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert "KeyError: 'points'" in told and "1 of 4 traces failed" in told
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["failed"]) == 1 and parquet.read_table(tmp_path / "run" / "traces.parquet").num_rows == 3


def test_without_a_trace_that_is_left_the_first_error_is_raised(alone, traces):
    judge = lambda *_: 1 / 0  # noqa: E731
    options = {"budget": Fixed(2), "max_new_tokens": LIMIT, "store": RolloutStore(None, {})}
    with pytest.raises(VerifierError, match="trace 0: ZeroDivisionError"):
        measure(traces[1], alone.host.sampler, judge, **options)


# Who may work.


def test_a_worker_of_another_version_is_refused_by_name(cluster):
    other = replace(SPEC, site=replace(Site(), version="0.0.1"))
    with (
        pytest.raises(WrongWorker, match=r"the worker \d+ on \S+ has tokencredit .*, and the command .* has 0.0.1"),
        pools.pool(other, "local", 1),
    ):
        pass


def leave(host):
    os._exit(1)


def changed(folder, factor):
    """The shipped model at `folder`, its head scaled."""
    model = load_model(resolve_model("reckon"))
    with torch.no_grad():
        next(model.parameters()).mul_(factor)
    model.save_pretrained(folder)


def test_a_piece_that_ends_its_worker_is_lost_and_another_model_is_refused(cluster, tmp_path, monkeypatch):
    """A worker that was started again loads its model again: in the end another one has been put there."""
    monkeypatch.setattr(pools, "RETRIES", 1)
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("reckon"), folder)
    with pools.pool(HostSpec(replace(CONFIG, model=str(folder)).as_dict()), "local", 1) as one:
        ((number, lost),) = one.run(leave, [()])
        assert number == 0 and isinstance(lost, Lost) and "its worker died 2 times" in str(lost.error)
        assert len(processes(one)) == 1, "the next piece finds a worker"
        changed(folder, 1.5)
        with pytest.raises(WrongWorker, match=rf"holds another model \(\w+\) than the others \({one.facts.model_hash}"):
            list(one.run(leave, [()]))


def test_workers_that_differ_are_refused(workers):
    class Other:
        """Who says that it holds another model, or verifies by other code."""

        def __init__(self, **told):
            self.told = told

        def remote(self):
            return workers.ray.put(replace(workers.facts, where="the worker 7 on other", **self.told))

    for told, message in (({"model_hash": "0" * 32}, "7 on other holds another model"), ({"source": "x"}, "verifier")):
        pool = Pool.__new__(Pool)
        pool.ray, pool.workers = workers.ray, [*workers.workers, argparse.Namespace(facts=Other(**told))]
        with pytest.raises(WrongWorker, match=message):
            pool._identities()


def test_bad_addresses_and_too_few_processors(cluster, capsys, monkeypatch, tmp_path):
    words = [*COMMAND, "--out", str(tmp_path / "none")]
    assert main([*words, "--ray", "127.0.0.1:9"]) == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert "no Ray cluster answers at 127.0.0.1:9" in told and "ray start --head" in told and "--ray local" in told
    assert main([*words, "--ray", "somewhere"]) == 1
    assert "local, auto or HOST:PORT" in capsys.readouterr().err.replace("\n", " ")
    assert main([*words, "--workers", "2"]) == 1
    assert "--workers is of workers on Ray" in capsys.readouterr().err
    assert main(["study", "compare", "--gpus-per-worker", "1", "--out", str(tmp_path / "none")]) == 1
    assert "--gpus-per-worker is of workers on Ray" in capsys.readouterr().err
    with pytest.raises(ValueError, match="5 workers need 5 CPUs, and the cluster has 4"):
        share(cluster, 5)
    with pytest.raises(ValueError, match=r"1 workers need 0\.5 GPUs, and the cluster has 0"):
        share(cluster, None, 0.5)
    assert share(cluster) == (4, 0.0) and not (tmp_path / "none").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"tokencredit\[ray\]"):
        import_ray()
    with pytest.raises(ValueError, match="--gpus-per-worker"):
        Workers(gpus=0.5)


# Jobs.


def ended_well(words):
    print(words)


def ended_badly(words):
    raise KeyError(words)


def test_jobs_are_tasks_with_a_log(cluster, tmp_path):
    logs = {name: tmp_path / f"{name}.log" for name in ("good", "bad", "gone", "absent")}
    for name in ("good", "bad", "gone"):
        logs[name].write_text("")
    good, bad = (
        Remote(cluster, 0, ended_well, ["a word"], logs["good"]),
        Remote(cluster, 0, ended_badly, "x", logs["bad"]),
    )
    gone, absent = Remote(cluster, 0, leave, [None], logs["gone"]), Remote(cluster, 0, ended_well, "x", logs["absent"])
    assert (good.wait(), bad.wait(), gone.wait(), absent.wait()) == (0, 1, 1, 1) and good.poll() == 0
    assert logs["good"].read_text() == "a word\n" and "error: 'x'" in logs["bad"].read_text()
    assert "error: its process ended" in logs["gone"].read_text()
    assert (
        "does not see" in logs["absent"].read_text() and "a folder that all of them share" in logs["absent"].read_text()
    )
    waiting = Remote(cluster, 0, signal.pause, [], logs["good"])
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0)
    waiting.kill()
    assert waiting.wait() == 1


def test_what_is_sent_comes_back_whole():
    for sent in (SPEC, Workers("local", 2), Trace((1,), (2,)), Lost(ValueError("x"))):
        assert str(pickle.loads(pickle.dumps(sent))) == str(sent)
    assert Away.run.__module__ == "tokencredit.pivotality.away" and Path(SPEC.site.folder) == Path.cwd()
