"""Something to do once a module has been imported, for plugins that must not import it themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Call = Callable[[ModuleType], None]


def after_import(name: str, call: Call) -> None:
    """Calls `call(module)` right after `name` was imported; at once where it has been already."""
    if name in sys.modules:
        call(sys.modules[name])
        return
    _WAITING.calls.setdefault(name, []).append(call)
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)


class _Waiting(MetaPathFinder):
    """Finds the modules that somebody waits for, where Python would have found them, and none other."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.calls:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        calls, execute = self.calls.pop(fullname), spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for call in calls:
                call(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_WAITING = _Waiting()
