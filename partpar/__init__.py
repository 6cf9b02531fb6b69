r"""Train graph neural networks on graphs that one process cannot hold: the same numbers as one process, on any number
of workers."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partpar.graph import GraphData
    from partpar.hetero_route import HeteroRoute
    from partpar.route import Route
    from partpar.training import init

__all__ = ["GraphData", "HeteroRoute", "Route", "init"]

_ROOMS = {"GraphData": "graph", "HeteroRoute": "hetero_route", "Route": "route", "init": "training"}


def __getattr__(name: str) -> Any:
    r"""Imports a public name, or a room, when it is first used: a program that needs no layers is spared PyG, 150 MB."""
    if name in _ROOMS:
        found = getattr(import_module(f"partpar.{_ROOMS[name]}"), name)
    elif not name.startswith("_") and find_spec(f"partpar.{name}") is not None:
        found = import_module(f"partpar.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
