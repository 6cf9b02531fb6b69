r"""Train graph neural networks on graphs that one process cannot hold: the same numbers as one process, on any number
of workers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partpar.graph import GraphData
    from partpar.hetero_route import HeteroRoute
    from partpar.route import Route
    from partpar.training import init

__all__ = ["GraphData", "HeteroRoute", "Route", "init"]

_ROOMS = {"GraphData": "graph", "HeteroRoute": "hetero_route", "Route": "route", "init": "training"}


def __getattr__(name: str) -> Any:
    r"""Imports a public name when it is first used: a program that needs no layers is spared PyG, 150 MB."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"partpar.{_ROOMS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
