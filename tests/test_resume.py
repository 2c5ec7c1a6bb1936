"""A run that goes on: what vouches for a checkpoint, what is done about a damaged one, and what is told. Real TRL, the
shipped model.
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file

from cuts import Cut, cut_at
from tokencredit import checkpoints
from tokencredit.checkpoints import COMPLETE, CheckpointWarning
from tokencredit.cli import main
from tokencredit.durable import DamagedFile, write_json
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.engines.recorder import Diverged, refuse_divergence
from tokencredit.engines.resume import is_full, is_write_failure
from tokencredit.engines.train import train
from tokencredit.lm.load import resolve_model
from tokencredit.runs import Run
from tokencredit.train_config import TrainConfig

CONFIG = TrainConfig(
    prompts=4,
    group=2,
    steps=4,
    eval_every=2,
    eval_prompts=4,
    eval_samples=2,
    record_every=2,
    record_rows=2,
    save_every=1,
    threads=1,
)
CLOCKS = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(CONFIG, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after step 7; its checkpoints are those of steps 4 and 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Cut):
        train(CONFIG, out, listen=cut_at(7))
    assert [path.name for path in checkpoints.marked(out / "checkpoints")] == ["checkpoint-6", "checkpoint-4"]
    return out


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def weights(out):
    return load_file(out / "checkpoints" / "checkpoint-8" / "model.safetensors")


def timeless(records):
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


def goes_on(out, whole, step):
    """Train again: it goes on from a step, and ends with the records and the weights of the run that was not cut."""
    told = []
    done = train(CONFIG, out, name=whole.info["name"], listen=lambda *each: told.append(each))
    assert told[0] == ("resume" if step else "start", {"step": step}) and done.status == "finished"
    assert timeless(done.metrics()) == timeless(whole.metrics())
    assert timeless(done.evaluations()) == timeless(whole.evaluations())
    assert done.token_steps() == whole.token_steps()
    mine, its = weights(out), weights(whole.path)
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


def zero(file, start=2000, size=200):
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(bytes(size))


DAMAGES = {
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "optimizer.pt has 0 bytes in place of": lambda folder: (folder / "optimizer.pt").write_bytes(b""),
    "model.safetensors holds other bytes": lambda folder: zero(folder / "model.safetensors"),
    "trainer_state.json has .* bytes in place of": lambda folder: (folder / "trainer_state.json").write_text("{"),
    "its mark .complete. cannot be read": lambda folder: (folder / COMPLETE).write_text('{"files": ['),
    "its mark .complete. cannot": lambda folder: (folder / COMPLETE).write_text("[]"),
}


def test_the_mark_lists_every_file_with_its_size_and_hash(whole):
    folder = whole.path / "checkpoints" / "checkpoint-8"
    files = json.loads((folder / COMPLETE).read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {COMPLETE}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files.keys()
    assert all(about["size"] == (folder / name).stat().st_size for name, about in files.items())
    assert checkpoints.damage(folder) is None


def test_files_are_on_the_disk_before_the_mark_is_written(tmp_path, monkeypatch):
    order = []
    folder = tmp_path / "checkpoint-1"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.bin", "inner/a.bin"):
        (folder / name).write_bytes(b"x")
    monkeypatch.setattr(checkpoints, "sync", lambda path: order.append(path))
    monkeypatch.setattr(checkpoints, "write_json", lambda path, value: order.append((path, sorted(value["files"]))))
    checkpoints.seal(folder)
    assert order[-1] == (folder / COMPLETE, ["b.bin", "inner/a.bin"])
    assert {folder / "b.bin", folder / "inner" / "a.bin", folder, folder / "inner", tmp_path} <= set(order[:-1])


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_not_used(run, whole, message):
    """Seen where the policy is opened, and where a study lists or opens it by its step."""
    folder = run / "checkpoints"
    DAMAGES[message](folder / "checkpoint-6")
    with pytest.warns(CheckpointWarning, match=rf"checkpoint-6 is damaged \({message}.*the one before it is used"):
        assert resolve_model(run) == str(folder / "checkpoint-4")
    with pytest.raises(DamagedFile, match=rf"checkpoint-6 is damaged: {message}"):
        resolve_model(folder / "checkpoint-6")


@pytest.mark.parametrize("message", ["optimizer.pt is missing", "model.safetensors holds other bytes"])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(run, whole, message):
    DAMAGES[message](run / "checkpoints" / "checkpoint-6")
    with pytest.warns(CheckpointWarning, match=rf"checkpoint-6 is damaged \({message}"):
        goes_on(run, whole, 4)
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert names == ["checkpoint-6", "checkpoint-8", "unused-checkpoint-6"]


def test_where_every_checkpoint_is_damaged_it_starts_again(run, whole):
    for step in (4, 6):
        (run / "checkpoints" / f"checkpoint-{step}" / "rng_state.pth").unlink()
    with pytest.warns(CheckpointWarning, match=r"checkpoint-. is damaged"):
        goes_on(run, whole, 0)


def test_a_finished_run_with_a_damaged_end_is_not_called_finished(whole, tmp_path):
    out = shutil.copytree(whole.path, tmp_path / "run")
    zero(out / "checkpoints" / "checkpoint-8" / "model.safetensors")
    with pytest.warns(CheckpointWarning, match="checkpoint-8 is damaged"):
        goes_on(out, whole, 6)


def test_names_that_are_no_checkpoints_are_left_alone(run, whole):
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-6-old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / COMPLETE).touch()
    shutil.copytree(run / "checkpoints" / "checkpoint-6", run / "checkpoints" / "checkpoint-7")
    (run / "checkpoints" / "checkpoint-7" / COMPLETE).unlink()
    with pytest.raises(DamagedFile, match="checkpoint-7 was cut short while it was written"):
        resolve_model(run / "checkpoints" / "checkpoint-7")
    assert resolve_model(run) == str(run / "checkpoints" / "checkpoint-6")
    goes_on(run, whole, 6)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"checkpoint-x", "checkpoint-", "checkpoint-6-old"} <= left and "checkpoint-7" not in left


def as_of_old(out, step):
    """The mark that versions before this one left: an empty file."""
    folder = out / "checkpoints" / f"checkpoint-{step}"
    (folder / COMPLETE).write_bytes(b"")
    return folder


def test_marks_of_older_runs_are_read_with_a_warning(run, whole):
    as_of_old(run, 6)
    with pytest.warns(CheckpointWarning, match="nobody can vouch for what it holds"):
        assert open_checkpoint(run).step == 6
    with pytest.warns(CheckpointWarning, match=r"checkpoint-6 was written by a version that listed no files"):
        goes_on(run, whole, 6)


@pytest.mark.parametrize("damaged", [lambda raw: raw[:5000], lambda raw: b"junk" * 1000], ids=["cut", "junk"])
def test_what_an_older_mark_cannot_see_is_named_when_it_is_read(run, whole, damaged):
    folder = as_of_old(run, 6)
    (folder / "optimizer.pt").write_bytes(damaged((folder / "optimizer.pt").read_bytes()))
    match = r"checkpoint-6 cannot be read \(.*Remove that directory, then run the same command again"
    with pytest.warns(CheckpointWarning, match="nobody can vouch"), pytest.raises(DamagedFile, match=match):
        train(CONFIG, run, name=whole.info["name"])
    assert Run.open(run).status == "failed"
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(ValueError, match=r"optimizer.pt is not a torch optimizer state"),
    ):
        open_checkpoint(run)
    shutil.rmtree(folder)
    goes_on(run, whole, 4)


def test_an_older_mark_beside_an_empty_or_missing_file(run, whole):
    folder = as_of_old(run, 6)
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match=r"checkpoint-6 is damaged \(optimizer.pt is empty\)"):
        goes_on(run, whole, 4)


def test_lost_records_are_named_and_made_again(run, whole):
    """Also those of a run that was finished, as this one is after the first time."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    with pytest.warns(CheckpointWarning, match=r"metrics.jsonl has no record of step 6, so .* checkpoint-6"):
        goes_on(run, whole, 4)
    for name in ("metrics", "evaluations"):
        (run / f"{name}.jsonl").write_text("")
        with pytest.warns(CheckpointWarning, match=rf"{name}.jsonl has no record of step"):
            goes_on(run, whole, 0)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize(
    "text, message",
    [("not json\n", "is not JSON"), ("[1]\n", "is a JSON list"), ('{"reward": 1}\n', "has no step")],
)
def test_damaged_records_are_named(run, capsys, name, text, message):
    with (run / name).open("a") as file:
        file.write(text)
    with pytest.raises(DamagedFile, match=rf"{name}, (line|record) . {message}.*remove"):
        train(CONFIG, run)


def test_damaged_tokens_are_named(whole, tmp_path, capsys):
    out = shutil.copytree(whole.path, tmp_path / "run")
    file = out / "tokens" / "step_000000.parquet"
    for raw in (file.read_bytes()[:3000], b"", b"PAR1" + bytes(100) + b"PAR1"):
        file.write_bytes(raw)
        with pytest.raises(DamagedFile, match=r"step_000000.parquet is not a whole Parquet file"):
            Run.open(out).tokens(0)
        assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 1
        assert "step_000000.parquet is not a whole Parquet file" in " ".join(capsys.readouterr().err.split())
    (out / "tokens" / "step_x.parquet").touch()
    assert Run.open(out).token_steps() == whole.token_steps()


@pytest.mark.parametrize(
    "text, message", [("[]", "holds a JSON list"), ("{}", "has format None"), ("{", "is not JSON")]
)
def test_a_damaged_run_json_is_named(run, capsys, text, message):
    (run / "run.json").write_text(text)
    for argv in (
        ["train", "--out", str(run)],
        ["report", str(run), "--out", str(run / "page.html")],
        ["dynamics", "entropy", "--run", str(run), "--out", str(run / "entropy")],
        ["evaluate", "--model", str(run), "--prompts", "2", "--samples", "1"],
    ):
        if text == "{}" and argv[0] in ("dynamics", "evaluate"):
            message = "run.json has no config"
        assert main(argv) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert message in told and "Traceback" not in told and "fault in tokencredit" not in told


@pytest.mark.parametrize("changes", [{"updates": 1}, {"updates": 2}])
def test_weights_that_are_no_numbers_end_a_run_as_failed(tmp_path, changes):
    config = {**CONFIG.as_dict(), "steps": 1, "learning_rate": 1e300, **changes}
    with pytest.raises(Diverged, match=r"step 1: .*the weights .* Lower learning_rate \(it is 1e\+300\)"):
        train(TrainConfig(**config), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and [record["step"] for record in run.metrics()] == [1]
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_refused(loss):
    layer = torch.nn.Linear(2, 2)
    refuse_divergence(3, 0.5, layer, 0.1)
    with pytest.raises(Diverged, match=r"step 3: the loss became NaN or infinite. Lower learning_rate \(it is 0.1\)"):
        refuse_divergence(3, loss, layer, 0.1)
    layer.weight.requires_grad_(False)[0, 1] = loss
    refuse_divergence(3, 0.5, layer, 0.1)  # a frozen weight is the model's own
    layer.weight.requires_grad_(True)
    with pytest.raises(Diverged, match="the loss and the weights"):
        refuse_divergence(3, loss, layer, 0.1)


def raised(write):
    with pytest.raises(Exception) as caught:
        write()
    return caught.value


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device without room on this system")
def test_only_what_could_not_be_written_is_told_as_such(tmp_path):
    """Errors as torch, safetensors and Python raise them; /dev/full has no room."""
    tensors, file = {"a": torch.ones(1000)}, tmp_path / "a.safetensors"
    file.touch()
    full = [
        raised(lambda: torch.save({"a": torch.ones(10**6)}, "/dev/full")),
        raised(lambda: Path("/dev/full").write_text("x" * 10**5)),
    ]
    assert all(is_write_failure(error) and is_full(error) for error in full)
    absent = [
        raised(lambda: save_file(tensors, tmp_path / "no" / "a.safetensors")),
        raised(lambda: write_json(file / "a.json", {})),
    ]
    assert all(is_write_failure(error) and not is_full(error) for error in absent)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:200])
    read = [raised(lambda: load_file(file)), raised(lambda: (tmp_path / "gone").read_text())]
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:1000])
    read.append(raised(lambda: torch.load(file, weights_only=True)))
    file.write_bytes(b"")
    read.append(raised(lambda: torch.load(file, weights_only=True)))
    assert not any(is_write_failure(error) for error in read), read
