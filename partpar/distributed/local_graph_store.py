r"""Under the name of the module that the original has it in."""

from partpar.serving.graph_store import LocalGraphStore

__all__ = ["LocalGraphStore"]
