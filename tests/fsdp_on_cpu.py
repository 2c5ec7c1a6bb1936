"""FSDP2 on CPUs, for tests: accelerate takes FSDP for GPUs alone, and leaves it out elsewhere without a word. As a
script it is `tokencredit` with that mended.

    accelerate launch --config_file examples/distributed/fsdp2.yaml tests/fsdp_on_cpu.py train --device cpu ...
"""

import sys
from contextlib import contextmanager

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextmanager
def sharding():
    """accelerate shards on CPUs as it does on GPUs, where a plugin asks for it."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **keywords):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain


def sharded(model) -> bool:
    """Whether every process holds a part of each matrix alone."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters() if p.dim() > 1)


if __name__ == "__main__":
    from tokencredit.cli import main

    with sharding():
        sys.exit(main())
