"""The page of a run, given to the services that the trainer reports to: an artefact of the run in trackio or W&B."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from transformers import TrainerCallback

from tokencredit.engines.trainer import Trainer

__all__ = ["SERVICES", "PageArtefact", "log_page"]

SERVICES = {"TrackioCallback": "trackio", "WandbCallback": "wandb"}
"""{transformers' callback that reports: the module of its service}"""


class PageArtefact(TrainerCallback):
    """Writes a page when training has ended and gives it to `services`, names of modules; one that fails is a warning,
    for a training that is done has not failed.
    """

    def __init__(self, write: Callable[[], Path], services: list[str], name: str = "tokencredit-report"):
        self.write, self.services, self.name = write, services, name

    def on_train_end(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        try:
            page = self.write()
        except Exception as error:
            warnings.warn(f"the page of this run was not written: {error}", stacklevel=2)
            return
        for service in self.services:
            try:
                _give(import_module(service), page, self.name)
            except Exception as error:
                warnings.warn(f"{page} was not given to {service}: {type(error).__name__}: {error}", stacklevel=2)


def _give(service: ModuleType, page: Path, name: str) -> None:
    if not hasattr(service, "log_artifact"):
        raise RuntimeError(f"this version has no log_artifact: pip install --upgrade {service.__name__}")
    service.log_artifact(str(page), name=name, type="report")
    if hasattr(service, "Html"):  # W&B shows it among the run's panels as well
        service.log({name: service.Html(page.read_text(encoding="utf-8"), inject=False)})


def log_page(trainer: Trainer, write: Callable[[], Path]) -> list[str]:
    """When this trainer's training has ended, writes a page and gives it to trackio and W&B, where `report_to` names
    them; answers to which.

    write   writes the page and answers where it is

        log_page(trainer, lambda: write_page([Path("runs/mine")], Path("runs/mine/report.html")))

    Their own callbacks, of which trackio's closes its run, are moved behind this one.
    """
    handler = trainer.callback_handler
    reporting = [each for each in handler.callbacks if type(each).__name__ in SERVICES]
    services = [SERVICES[type(each).__name__] for each in reporting]
    if reporting:
        others = [each for each in handler.callbacks if each not in reporting]
        handler.callbacks[:] = [*others, PageArtefact(write, services), *reporting]
    return services
