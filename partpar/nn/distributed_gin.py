r"""Graph isomorphism networks on learned rows that no worker holds whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.graph import GraphData
from partpar.kernels.adjacency import Adjacency
from partpar.nn.chunks import CHUNK_SIZE, in_chunks, shard
from partpar.nn.gin import GINConv, GINEConv
from partpar.nn.rows import Rows
from partpar.route import Route
from partpar.sharded.embedding import DistEmbedding, lookup
from partpar.sharded.initializers import InitFunc, Normal
from partpar.sharded.policy import PartPolicy
from partpar.sharded.tensor import DistTensor

Policy = PartPolicy | Tensor | Sequence[int] | GraphData | None


class LearnedRows(torch.nn.Module):
    r"""Tables of rows to learn, for nodes and for edges, that are made once it is known how many there are.

    Args:
        owner: Whose they are, for messages.
        node_dim: Columns of the nodes' table; :obj:`None` for no such table.
        edge_dim: Columns of the edges' table; :obj:`None` for no such table.
        node_name: The nodes' table's name.
        edge_name: The edges' table's name.
    """

    def __init__(
        self,
        owner: str,
        node_dim: int | None = None,
        edge_dim: int | None = None,
        node_name: str | None = None,
        edge_name: str | None = None,
    ) -> None:
        super().__init__()
        self._owner, self._node_name, self._edge_name = owner, node_name, edge_name
        self.node_dim, self.edge_dim = node_dim, edge_dim
        self.nodes: DistEmbedding | None = None
        self.edges: DistEmbedding | None = None

    def make(
        self,
        num_nodes: int,
        num_edges: int | None,
        node_policy: Policy,
        edge_policy: Policy,
        init_func: InitFunc | None,
        dtype: torch.dtype,
    ) -> None:
        r"""Makes the tables (collective)."""
        if self.edge_dim is not None and num_edges is None:
            raise RouteError(
                f"{self._owner}: expected num_edges for the rows of edges, found None; call set_num_embeddings(num_nodes, num_edges)"
            )
        if self.node_dim is not None:
            init = Normal(std=self.node_dim**-0.5) if init_func is None else init_func
            self.nodes = DistEmbedding(num_nodes, self.node_dim, self._node_name, init, node_policy, dtype)
        if self.edge_dim is not None and num_edges is not None:
            init = Normal(std=self.edge_dim**-0.5, seed=1) if init_func is None else init_func
            self.edges = DistEmbedding(num_edges, self.edge_dim, self._edge_name, init, edge_policy, dtype)

    @property
    def tables(self) -> list[DistEmbedding]:
        return [table for table in (self.nodes, self.edges) if table is not None]

    def forward(self, node_ids: Tensor | None, edge_ids: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        r"""Rows of nodes and rows of edges, in one exchange (collective)."""
        asked: dict[DistEmbedding, Tensor] = {}
        for what, wanted, table, ids in (
            ("node", self.node_dim is not None, self.nodes, node_ids),
            ("edge", self.edge_dim is not None, self.edges, edge_ids),
        ):
            if not wanted:
                continue
            if table is None:
                raise RouteError(
                    f"{self._owner}: expected to know how many {what}s have learned rows, found that nobody said so; "
                    f"call set_num_embeddings(num_nodes{', num_edges' if what == 'edge' else ''}) first"
                )
            if ids is None:
                raise RouteError(f"{self._owner}: expected {what}_ids for the learned rows of {what}s, found None")
            asked[table] = ids
        found = lookup(asked)
        return (
            None if self.nodes is None else found[self.nodes],
            None if self.edges is None else found[self.edges],
        )


def add_learned(owner: str, x: Tensor | None, learned: Tensor | None) -> Any:
    r"""Learned rows take the place of rows, or are added to them.

    Raises:
        RouteError: There are neither, or they have different widths.
    """
    if learned is None:
        if x is None:
            raise RouteError(f"{owner}: expected rows, found None; pass them, or set use_dist_embedding")
        return x
    if x is None:
        return learned
    if not isinstance(x, Tensor) or x.shape != learned.shape:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise RouteError(f"{owner}: expected rows of shape {tuple(learned.shape)} to add learned ones to, found {found}")
    return x + learned


def _keeps_chunks(layer: torch.nn.Module, use_dist_tensor: bool, route: Route | None, edges: Any) -> bool:
    """Whether a call is inference over a share, whose rows go through sharded tensors."""
    return use_dist_tensor and route is not None and not layer.training and not torch.is_grad_enabled()


class DistributedGINConv(GINConv):
    r""":class:`~partpar.nn.GINConv` whose input rows may be learned, and whose output may be kept as a
    :class:`~partpar.sharded.DistTensor`. With both off it is :class:`~partpar.nn.GINConv`.

    Args:
        nn (Callable): As for :class:`~partpar.nn.GINConv`; likewise :obj:`eps` and :obj:`train_eps`.
        use_dist_embedding (bool, optional): Learn a row for each node, which takes the place of :obj:`x`, or is added to
            it where it is given. See :meth:`set_num_embeddings`.
        embedding_dim (int, optional): Columns of these rows.
        embedding_name (str, optional): Name of their table.
        use_dist_tensor (bool, optional): In evaluation on a share, compute :obj:`chunk_size` nodes at a time, without
            ever holding the whole halo; :attr:`output` is the result as a :class:`~partpar.sharded.DistTensor`.
        chunk_size (int, optional): Nodes at a time.
        **kwargs (optional): Arguments of :class:`torch_geometric.nn.conv.MessagePassing`.

    Raises:
        RouteError: :obj:`use_dist_embedding` without :obj:`embedding_dim`.
    """

    def __init__(
        self,
        nn: Callable[..., Any],
        eps: float = 0.0,
        train_eps: bool = False,
        use_dist_embedding: bool = False,
        embedding_dim: int | None = None,
        embedding_name: str | None = None,
        use_dist_tensor: bool = False,
        chunk_size: int = CHUNK_SIZE,
        **kwargs: Any,
    ) -> None:
        super().__init__(nn, eps, train_eps, **kwargs)
        name = type(self).__name__
        dim = _dimension(name, use_dist_embedding, embedding_dim, "embedding_dim")
        self.learned = LearnedRows(name, dim, None, embedding_name)
        self.use_dist_tensor, self.chunk_size = use_dist_tensor, chunk_size
        self.output: DistTensor | None = None

    def set_num_embeddings(
        self,
        num_nodes: int,
        part_policy: Policy = None,
        init_func: InitFunc | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        r"""Makes the table of learned rows (collective).

        Args:
            num_nodes: Rows.
            part_policy: Which worker keeps which, see :class:`~partpar.sharded.DistTensor`.
            init_func: First values, by default normal with variance ``1 / embedding_dim``.
            dtype: By default that of the layer.
        """
        self.learned.make(num_nodes, None, part_policy, None, init_func, dtype or dtype_of(self))

    def forward(
        self,
        x: Rows | None,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        node_ids: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the layer on owned rows (collective).

        Args:
            x (torch.Tensor, optional): The rows of the owned nodes; may be left out where rows are learned.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            node_ids (torch.Tensor, optional): ``[num_owned]`` int64, whose learned rows these nodes have.
        """
        rows = add_learned(type(self).__name__, x, self.learned(node_ids)[0])  # type: ignore[arg-type]
        if not _keeps_chunks(self, self.use_dist_tensor, route, edge_index):
            return super().forward(rows, edge_index, route)
        assert route is not None
        run = super().forward
        self.output = in_chunks(
            lambda pair, block, _: run(pair, block), shard(rows, route), edge_index, route, {}, self.chunk_size
        )
        return self.output.local_rows


class DistributedGINEConv(GINEConv):
    r""":class:`~partpar.nn.GINEConv` whose input rows and edge attributes may be learned; see
    :class:`DistributedGINConv`.

    Args:
        nn (Callable): As for :class:`~partpar.nn.GINEConv`; likewise :obj:`eps`, :obj:`train_eps`, :obj:`edge_dim`.
        use_dist_embedding, embedding_dim, embedding_name, use_dist_tensor, chunk_size: As for
            :class:`DistributedGINConv`.
        use_dist_edge_embedding (bool, optional): Learn a row for each edge, which takes the place of
            :obj:`edge_attr`, or is added to it where it is given.
        edge_embedding_dim (int, optional): Columns of these rows; by default :obj:`edge_dim`.
        edge_embedding_name (str, optional): Name of their table.
    """

    def __init__(
        self,
        nn: torch.nn.Module,
        eps: float = 0.0,
        train_eps: bool = False,
        use_dist_embedding: bool = False,
        embedding_dim: int | None = None,
        embedding_name: str | None = None,
        use_dist_tensor: bool = False,
        edge_dim: int | None = None,
        use_dist_edge_embedding: bool = False,
        edge_embedding_dim: int | None = None,
        edge_embedding_name: str | None = None,
        chunk_size: int = CHUNK_SIZE,
        **kwargs: Any,
    ) -> None:
        super().__init__(nn, eps, train_eps, edge_dim, **kwargs)
        name = type(self).__name__
        dim = _dimension(name, use_dist_embedding, embedding_dim, "embedding_dim")
        edge = _dimension(name, use_dist_edge_embedding, edge_embedding_dim or edge_dim, "edge_embedding_dim")
        self.learned = LearnedRows(name, dim, edge, embedding_name, edge_embedding_name)
        self.use_dist_tensor, self.chunk_size = use_dist_tensor, chunk_size
        self.output: DistTensor | None = None

    def set_num_embeddings(
        self,
        num_nodes: int,
        num_edges: int | None = None,
        part_policy: Policy = None,
        edge_part_policy: Policy = None,
        init_func: InitFunc | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        r"""Makes the tables of learned rows (collective); arguments as for
        :meth:`DistributedGINConv.set_num_embeddings`."""
        self.learned.make(num_nodes, num_edges, part_policy, edge_part_policy, init_func, dtype or dtype_of(self))

    def forward(
        self,
        x: Rows | None,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        edge_attr: Tensor | None = None,
        node_ids: Tensor | None = None,
        edge_ids: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the layer on owned rows (collective).

        Args:
            x, edge_index, route, node_ids: As for :meth:`DistributedGINConv.forward`.
            edge_attr (torch.Tensor, optional): A row for each edge; may be left out where these are learned.
            edge_ids (torch.Tensor, optional): ``[E]`` int64, whose learned rows these edges have.
        """
        name = type(self).__name__
        of_nodes, of_edges = self.learned(node_ids, edge_ids)
        rows = add_learned(name, x, of_nodes)  # type: ignore[arg-type]
        attr = edge_attr if of_edges is None else add_learned(name, edge_attr, of_edges)
        if attr is None or not _keeps_chunks(self, self.use_dist_tensor, route, edge_index):
            return super().forward(rows, edge_index, route, attr)
        assert route is not None
        run = super().forward
        self.output = in_chunks(
            lambda pair, block, of: run(pair, block, None, of["edge_attr"]), shard(rows, route), edge_index, route,
            {"edge_attr": attr}, self.chunk_size,
        )  # fmt: skip
        return self.output.local_rows


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    r"""That of a module's parameters; torch's default where it has none."""
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _dimension(owner: str, used: bool, dim: int | None, name: str) -> int | None:
    if not used:
        return None
    if dim is None or dim < 1:
        raise RouteError(f"{owner}: expected {name} of at least 1 for learned rows, found {dim}")
    return dim
