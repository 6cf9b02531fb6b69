r"""Where a partition's files stand and what the tensors in a share are called.

::

    root/metis_4/
      manifest.json
      meta.safetensors         tensors of the graph as a whole, if there are any
      000.safetensors          share 0: node/{type}/…, edge/{source}/{relation}/{destination}/…
      …
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from partpar.graph import EdgeType

FORMAT = "partpar"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
META = "meta.safetensors"
RESERVED = ("raw_ids", "ids")  # names in the frames of every share


def partition_folder(root: str | Path, algorithm: str, num_parts: int) -> Path:
    r"""Where a partition stands."""
    return Path(root) / f"{algorithm}_{num_parts}"


def share_file(part_id: int) -> str:
    r"""The name of a share's file."""
    return f"{part_id:03d}.safetensors"


def node_key(node_type: str, *name: str) -> str:
    r"""The tensor name of a piece of a node type; parts are quoted so that any type name can be told apart."""
    return "/".join(("node", *(quote(s, safe="") for s in (node_type, *name))))


def edge_key(edge_type: EdgeType, *name: str) -> str:
    r"""The tensor name of a piece of an edge type."""
    return "/".join(("edge", *(quote(s, safe="") for s in (*edge_type, *name))))
