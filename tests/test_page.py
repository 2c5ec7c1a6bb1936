"""The page of a training run as an artefact of the services that the trainer reports to; a module of ours stands in for
the service, transformers' own callbacks report to it.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tokencredit.engines.page import log_page
from tokencredit.engines.trl import CreditTrainer
from trl_tiny import build

TRACKIO = """
from pathlib import Path
told = []
config = type("Config", (dict,), {"update": lambda self, values, allow_val_change: None})()
class context_vars:
    class current_space_id:
        get = staticmethod(lambda: None)
def init(**options): told.append(("init", options["project"]))
def log(figures, step=None): told.append(("log", sorted(figures)))
def log_artifact(path, name=None, type=None): told.append(("artifact", name, type, Path(path).read_text()))
def finish(): told.append(("finish",))
"""


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "service")
    module = __import__("trackio")
    monkeypatch.setattr(
        "trl.extras.profiling.trackio", module, raising=False
    )  # it is imported there where it is installed
    yield module
    sys.modules.pop("trackio", None)


def trained(folder, write, **changes):
    """A tiny training with a page; and the services that are to get it."""
    trainer = build(CreditTrainer, folder, {"max_steps": 1, **changes}, method="grpo")
    services = log_page(trainer, write)
    trainer.train()
    return trainer, services


def test_the_page_is_given_before_the_service_is_closed(tmp_path, trackio):
    page = tmp_path / "report.html"

    def write():
        page.write_text("<p>the page</p>")
        return page

    _, services = trained(tmp_path, write, report_to=["trackio"])
    assert services == ["trackio"]
    kinds = [each[0] for each in trackio.told]
    assert kinds[0] == "init" and kinds[-2:] == ["artifact", "finish"]
    assert trackio.told[-2] == ("artifact", "tokencredit-report", "report", "<p>the page</p>")
    logged = {name for each in trackio.told if each[0] == "log" for name in each[1]}
    assert {"train/credited_share", "train/clip_ratio/low_mean", "train/frac_reward_zero_std"} <= logged


def test_without_a_service_no_page_is_written(tmp_path):
    _, services = trained(tmp_path, lambda: pytest.fail("written for nobody"))
    assert services == []


@pytest.mark.parametrize("fault", ["service", "page", "old"])
def test_what_fails_is_said_and_the_training_stands(tmp_path, trackio, monkeypatch, fault):
    def fails(*_, **__):
        raise OSError("no space left")

    if fault == "service":
        monkeypatch.setattr(trackio, "log_artifact", fails)
    if fault == "old":
        monkeypatch.delattr(trackio, "log_artifact")
    said = {
        "service": "report.html was not given to trackio: OSError: no space left",
        "page": "the page of this run was not written: no space left",
        "old": "pip install --upgrade trackio",
    }[fault]
    with pytest.warns(UserWarning, match=said):
        trainer, _ = trained(
            tmp_path, fails if fault == "page" else lambda: tmp_path / "report.html", report_to=["trackio"]
        )
    assert trainer.state.global_step == 1 and trackio.told[-1] == ("finish",)
