"""Reference models that call the ops."""

from types import ModuleType

from ..lazy import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
