"""`tokencredit doctor verl`: whether verl's workers find what is registered here, seen from a Ray worker."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from tokencredit import __version__
from tokencredit.console import add_command, console
from tokencredit.engines.verl import CHANNEL, PREFIX

EXTRA = "pip install 'tokencredit[verl]'"
PACKAGES = ("verl", "ray", "TransferQueue", "tensordict", "torch", "transformers")
ENGINES = ("vllm", "sglang", "tensorrt_llm")
TRAINERS = tuple(PREFIX + mode for mode in ("sync", "colocate_async", "separate_async"))


@dataclass(frozen=True)
class Examined:
    """What a process found.

    host, tokencredit  where it runs, and the version there
    versions           of PACKAGES, None for what is not installed
    policy             VERL_USE_EXTERNAL_PLUGINS: which plugins verl loads there
    losses, trainers   names of ours in verl's registries
    engines            rollout engines that can be imported
    faults             what stands in the way, each with what to do
    """

    host: str
    tokencredit: str
    versions: dict[str, str | None]
    policy: str
    losses: tuple[str, ...] = ()
    trainers: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    faults: tuple[str, ...] = field(default=())


def add_parser(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        None,
        "Whether an engine finds what it needs.",
        "examples:\n  tokencredit doctor verl",
    )
    actions = doctor.add_subparsers(title="engines", metavar="")
    p = add_command(
        actions,
        "verl",
        _verl,
        "Load everything in a Ray worker; what is registered there, in which versions, and what is missing.",
        "examples:\n  tokencredit doctor verl\n  tokencredit doctor verl --address auto --methods",
    )
    p.add_argument("--address", help="of a running Ray cluster, as ray.init takes it (default: one worker here)")
    p.add_argument("--methods", action="store_true", help="also how verl carries each method")


def _verl(args: Any) -> int:
    in_worker = importable("ray") and importable("verl")
    found = examine_in_worker(args.address) if in_worker else examine()
    place = "in a Ray worker" if in_worker else "in this process"
    console.print(f"verl {place} on {found.host}, tokencredit {found.tokencredit}")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, version in found.versions.items():
        table.add_row(name, Text(version) if version else Text("not installed", style="red"))
    table.add_row("trainers", ", ".join(found.trainers) or "none of ours")
    table.add_row("policy losses", f"{len(found.losses)} of ours" if found.losses else "none of ours")
    table.add_row("rollout engines", ", ".join(found.engines) or "none: verl samples with vllm, sglang or tensorrt_llm")
    console.print(table)
    if args.methods:
        console.print(_methods())
    faults = [*found.faults, *_other_version(found)]
    for fault in faults:
        console.print(Text("missing: ", style="bold red") + Text(fault), soft_wrap=True)
    if not faults:
        console.print("All is there: trainer.v1.trainer_mode=tokencredit_sync +trainer.v1.tokencredit.method=gtpo")
    return 1 if faults else 0


def examine_in_worker(address: str | None = None) -> Examined:
    """`examine` in a worker of a Ray cluster: of the one at `address`, or of one that is started for it."""
    import ray

    own = {"num_cpus": 1, "include_dashboard": False} if address is None else {}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    try:
        return Examined(**ray.get(ray.remote(_as_dict).remote()))
    finally:
        ray.shutdown()


def _as_dict() -> dict[str, Any]:
    return vars(examine())


def examine() -> Examined:
    """What this process finds, importing what a run of verl imports."""
    versions = {name: _version(name) for name in PACKAGES}
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    losses, trainers, faults = (), (), []
    if versions["verl"] is None:
        faults.append(f"verl: {EXTRA}")
    else:
        core, fault = _imported("verl.trainer.ppo.core_algos")
        losses = () if core is None else _ours(core.POLICY_LOSS_REGISTRY)
        v1, other = _imported("verl.trainer.ppo.v1")
        trainers = () if v1 is None else _ours(v1.trainer_base.TRAINER_REGISTRY)
        faults += [each for each in (fault, other) if each]
        faults += _unregistered(policy, losses, trainers) if not faults else []
    engines = tuple(name for name in ENGINES if importable(name))
    return Examined(socket.gethostname(), __version__, versions, policy, losses, trainers, engines, tuple(faults))


def _imported(name: str) -> tuple[Any, str | None]:
    """(the module, None), or (None, why it cannot be imported)."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        return None, f"{error.name}, which {name} imports: {EXTRA}"
    except Exception as error:
        return None, f"{name} cannot be imported ({type(error).__name__}: {error})"


def _unregistered(policy: str, losses: tuple[str, ...], trainers: tuple[str, ...]) -> list[str]:
    """Why the plugin has not registered what it should have."""
    if set(TRAINERS) <= set(trainers) and CHANNEL in losses:
        return []
    points = importlib.metadata.entry_points(group="verl.plugins")
    if "tokencredit" not in {point.name for point in points}:
        return ["the entry point verl.plugins of tokencredit: install it as a package, PYTHONPATH alone has none"]
    if policy != "auto" and "tokencredit" not in [name.strip() for name in policy.split(",")]:
        return [f"the plugin, since VERL_USE_EXTERNAL_PLUGINS={policy}: add tokencredit to it, or unset it"]
    return ["the plugin's losses and trainers, although it was loaded: see what it printed above"]


def _other_version(found: Examined) -> list[str]:
    if found.tokencredit == __version__:
        return []
    return [f"tokencredit {__version__} on the workers, which have {found.tokencredit}: install the same everywhere"]


def _ours(registry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(name for name in registry if name.startswith(PREFIX)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _methods() -> Table:
    from tokencredit.engines.verl.carried import STORED, carried
    from tokencredit.methods import METHODS

    table = Table("method", "carried by", "because", "scores to give", box=None, pad_edge=False)
    for method in METHODS.values():
        how = carried(method.within(1))
        by = "the loss function" if how.in_channel else f"the policy loss, {how.loss_agg_mode}"
        table.add_row(method.name, by, how.why, ", ".join(sorted(method.needs - STORED)))
    return table
