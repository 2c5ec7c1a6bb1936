"""A device that is not the CPU, without one: tensors that say they are elsewhere and compute here.

    with elsewhere():
        move(model)
        ...

A tensor there is `Elsewhere`, whose device is DEVICE. As with a GPU, it mixes with no tensor of the CPU but a number
and, where a tensor is indexed, its index; numpy refuses it; `.cpu()` brings it back. What the code under test makes
with `device=x.device` is there too.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("lazy", 0)  # a type that torch knows, that autograd runs in its own thread, and nobody has
COPIES = ("copy_", "_to_copy", "_copy_from", "set_")
INDEXED = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")


class Elsewhere(Tensor):
    """Data of the CPU that says it is on DEVICE."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, data: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, data: Tensor):
        self.data_here = data

    def __repr__(self):
        return f"Elsewhere({self.data_here!r})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Made(TorchDispatchMode):
    """Catches what is made there from nothing, or brought there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Written(TorchFunctionMode):
    """Catches tensors that are written out as numbers: torch fills those before any dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            found = function(*args, **kwargs | {"device": "cpu"})
            return found if isinstance(found, Elsewhere) else Elsewhere(found)
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return Elsewhere(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)))
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            args = (args[0], _index(args[1]), *args[2:])
        return function(*args, **kwargs)


def _index(index):
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _is_there(device) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(function, args, kwargs):
    name, device = function._schema.name.split("::")[1], kwargs.get("device")
    tensors = list(_tensors((*args, *kwargs.values())))
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    if not there and not _is_there(device):
        return function(*args, **kwargs)
    if there and name not in COPIES:
        _refuse_mixture(name, args, tensors)
    if _is_there(device):
        kwargs = kwargs | {"device": torch.device("cpu")}
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")
        outside = True
    elif name == "copy_":
        outside = isinstance(args[0], Elsewhere)
    else:
        outside = device is None
    found = function(*_each(_here, args), **{name: _each(_here, x) for name, x in kwargs.items()})
    if name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], Tensor):
        return args[0]
    return _each(_there, found) if outside else found


def _tensors(arguments):
    """Those of an operator's arguments, which nest in lists and tuples alone."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _each(function, x):
    return type(x)(_each(function, one) for one in x) if isinstance(x, list | tuple) else function(x)


def _here(x):
    return x.data_here if isinstance(x, Elsewhere) else x


def _there(x):
    return Elsewhere(x) if isinstance(x, Tensor) else x


def _refuse_mixture(name, args, tensors):
    allowed = args[1] if name in INDEXED else ()
    for x in tensors:
        if not isinstance(x, Elsewhere) and x.dim() and not any(x is index for index in allowed):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and {x.device}")


@contextmanager
def elsewhere():
    """Inside, tensors can be moved to DEVICE and made there."""
    asked, derived = torch.is_autocast_enabled, torch.func.jvp
    torch.func.jvp = _difference
    torch.is_autocast_enabled = lambda kind=None: kind != DEVICE.type and asked(*([kind] if kind else []))
    try:
        with _Made(), _Written():
            yield
    finally:
        torch.is_autocast_enabled, torch.func.jvp = asked, derived


def _difference(function, primals, tangents, step=1e-3):
    """torch.func.jvp, whose own duals take no other tensors: by a central difference, in trees of tensors."""

    def moved(by):
        return function(*tree_map(lambda x, u: x + by * u, primals, tangents))

    return function(*primals), tree_map(lambda a, b: (a - b) / (2 * step), moved(step), moved(-step))


def move(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers are there from now on; shared ones stay shared."""
    moved: dict[int, Tensor] = {}

    def of(x: Tensor) -> Tensor:
        if id(x) not in moved:
            there = Elsewhere(x.detach())
            moved[id(x)] = nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there
        return moved[id(x)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: of(x) for name, x in own.items() if x is not None})
    return model
