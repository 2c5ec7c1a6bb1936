"""verl on a CPU, for tests: a platform, its FSDP engine, a rollout engine on `PrefixSampler`, and runs of `main_ppo`.

verl imports this module in every process (VERL_USE_EXTERNAL_MODULES=verl_cpu); with VERL_PLATFORM=cpu it finds the
platform here. What is replaced goes through verl's own registries, but for one argument of the process group.
"""

from tokencredit.engines.after_import import after_import
from verl_cpu import platform  # noqa: F401


def _engine(module):
    register = module.EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
    register(module.FSDPEngineWithLMHead)


def _process_group(module):
    """verl asks for "cpu:gloo,<device>:<backend>", which here names the cpu twice."""
    original = module.initialize_global_process_group_ray
    module.initialize_global_process_group_ray = lambda timeout_second=None, backend=None: original(
        timeout_second, backend or "gloo"
    )


def _replica(module):
    from verl_cpu.rollout import NAME, no_server

    module.RolloutReplicaRegistry.register(NAME, no_server)


def _rollout(module):
    from verl_cpu.rollout import NAME

    module._ROLLOUT_REGISTRY[NAME, "async"] = "verl_cpu.rollout.WeightFile"


after_import("verl.workers.engine.fsdp.transformer_impl", _engine)
after_import("verl.utils.distributed", _process_group)
after_import("verl.workers.rollout.replica", _replica)
after_import("verl.workers.rollout.base", _rollout)
