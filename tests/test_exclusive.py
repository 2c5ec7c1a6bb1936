"""One process for a directory: who holds it is named, a killed one lets go, and what a killed command started ends."""

import fcntl
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tokencredit.cli import main
from tokencredit.exclusive import LOCK, exclusive, holds_out
from tokencredit.runs import Run
from tokencredit.studies.table import STUDIES

HOLDER = """
import sys
from tokencredit.exclusive import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
FORKING = """
import os, sys
from tokencredit.exclusive import exclusive
with exclusive(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.read(0, 1)
        os._exit(0)
    os.read(0, 1)
"""


def start(script, *arguments, **options):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, **pipes | options)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/held."""
    process = start(HOLDER, tmp_path / "held")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_holder_is_named_and_lets_go_when_killed(holder, tmp_path):
    message = rf"held is being written by another process \(process {holder.pid}\): wait for it, or choose another"
    with pytest.raises(RuntimeError, match=message), exclusive(tmp_path / "held"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(tmp_path / "held"):
        assert (tmp_path / "held" / LOCK).read_text() == f"{os.getpid()}\n"
    (tmp_path / "held" / "result.json").touch()


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """Its parent is killed while it waits for a line that never comes."""
    parent = start(FORKING, tmp_path)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    os.kill(child, 0)
    with exclusive(tmp_path):
        pass
    parent.communicate()  # the child ends with its standard input


def test_a_directory_that_nothing_was_put_into_is_removed(tmp_path):
    with exclusive(tmp_path / "empty"):
        pass
    with exclusive(tmp_path / "used"):
        (tmp_path / "used" / "a").touch()
    (tmp_path / "there").mkdir()
    with exclusive(tmp_path / "there"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "used"]


def test_a_function_holds_its_directory(tmp_path):
    @holds_out
    def work(one, out, *, two=2):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()}"), exclusive(out):
            pass
        return one + two

    assert work(1, tmp_path / "a") == 3 and work(1, out=tmp_path / "b", two=5) == 6


@pytest.mark.parametrize("name", STUDIES)
def test_studies_hold_their_directory(name, holder, tmp_path):
    """Refused before anything else is looked at."""
    with pytest.raises(RuntimeError, match=rf"held is being written by another process \(process {holder.pid}\)"):
        STUDIES[name].run(SimpleNamespace(seed=0), tmp_path / "held")


@pytest.mark.parametrize(
    "argv",
    [
        ["pivotality", "run", "--out", "{}"],
        ["pivotality", "export", "{}"],
        ["study", "correlation", "--out", "{}"],
        ["study", "variance", "--out", "{}"],
        ["dynamics", "noise-scale", "--run", "reckon", "--out", "{}"],
        ["demo", "--out", "{}"],
    ],
)
def test_commands_hold_their_directory(argv, holder, tmp_path, capsys):
    assert main([part.format(tmp_path / "held") for part in argv]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"is being written by another process (process {holder.pid}): wait for it" in told


def test_a_killed_demo_takes_its_runs_with_it(tmp_path):
    """Both runs have begun when it is killed; each lets go of its directory, before it is finished."""
    out = tmp_path / "demo"
    argv = ["-m", "tokencredit", "demo", "--out", str(out), "--methods", "grpo", "--seeds", "2", "--workers", "2"]
    with (tmp_path / "log").open("w") as log:
        demo = subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log)
    runs = [out / "grpo-0", out / "grpo-1"]
    while not all((run / "run.json").exists() for run in runs):
        assert demo.poll() is None, (tmp_path / "log").read_text()
    demo.send_signal(signal.SIGKILL)
    demo.wait()
    for run in runs:
        with (run / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits until its process has ended
        assert Run.open(run).status == "running"


def test_a_command_without_its_parent_ends(tmp_path):
    """What it finds in the variable is not its parent: that one ended before it could ask to be told."""
    environment = {**os.environ, "TOKENCREDIT_PARENT": "1"}
    done = subprocess.run([sys.executable, "-m", "tokencredit", "methods"], env=environment, capture_output=True)
    assert done.returncode == 1 and done.stdout == b""
