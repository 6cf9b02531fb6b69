r"""From a whole graph to shares on disk, and back to one share: algorithms, the cut, files and manifest, quality report."""

from partpar.partition.load import load_partition, open_share
from partpar.partition.manifest import Manifest, read_manifest
from partpar.partition.write import partition_graph

__all__ = ["Manifest", "load_partition", "open_share", "partition_graph", "read_manifest"]
