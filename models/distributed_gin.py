r"""Graph isomorphism networks for nodes and for whole graphs, on learned rows that no worker holds whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from partpar.models.basic_gnn import BasicGNN
from torch import Tensor
from torch_geometric.utils import scatter

from partpar import exchange
from partpar.errors import RouteError
from partpar.kernels.adjacency import Adjacency
from partpar.nn import MLP, SourceRows
from partpar.nn.chunks import CHUNK_SIZE, in_chunks, shard
from partpar.nn.distributed_gin import (
    DistributedGINConv,
    DistributedGINEConv,
    LearnedRows,
    Policy,
    add_learned,
    dtype_of,
)
from partpar.route import Route
from partpar.sharded.embedding import DistEmbedding
from partpar.sharded.initializers import InitFunc

POOLINGS = ("sum", "mean")


class DistributedGIN(BasicGNN):
    r"""The network of `"How Powerful are Graph Neural Networks?" <https://arxiv.org/abs/1810.00826>`_ on rows of a
    partitioned graph, whose input may be learned (:class:`~partpar.sharded.DistEmbedding`).

    With the flags off it is :class:`torch_geometric.nn.models.GIN`, weights and ``state_dict`` included; note that
    :obj:`out_channels` comes before :obj:`num_layers`.

    Args:
        in_channels (int): Size of each input row.
        hidden_channels (int): Size of each hidden row.
        out_channels (int): Size of each output row.
        num_layers (int): Number of layers.
        use_dist_embedding (bool, optional): Learn a row for each node, which takes the place of :obj:`x`, or is added to
            it where it is given. See :meth:`set_num_embeddings`.
        embedding_dim (int, optional): Columns of these rows; a linear map brings them to :obj:`in_channels` where that is
            another number. (default: :obj:`in_channels`)
        embedding_name (str, optional): Name of their table.
        use_dist_tensor (bool, optional): In evaluation on a share, keep layer outputs as
            :class:`~partpar.sharded.DistTensor` and compute :obj:`chunk_size` nodes at a time, so that the whole halo is
            never held.
        chunk_size (int, optional): Nodes at a time.
        pooling (str, optional): How nodes' outputs make a graph's: ``"sum"`` or ``"mean"``.
        **kwargs (optional): Arguments of :class:`~partpar.models.BasicGNN` and of the layers.
    """

    supports_edge_weight = False
    supports_edge_attr = False

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int | None,
        num_layers: int,
        *,
        use_dist_embedding: bool = False,
        embedding_dim: int | None = None,
        embedding_name: str | None = None,
        use_dist_tensor: bool = False,
        chunk_size: int = CHUNK_SIZE,
        pooling: str = "sum",
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if pooling not in POOLINGS or chunk_size < 1:
            raise RouteError(
                f"{name}: expected pooling among {', '.join(POOLINGS)} and chunk_size of at least 1, found {pooling!r} and {chunk_size}"
            )
        super().__init__(in_channels, hidden_channels, num_layers, out_channels, **kwargs)
        self.use_dist_tensor, self.chunk_size, self.pooling = use_dist_tensor, chunk_size, pooling
        dim = (embedding_dim or in_channels) if use_dist_embedding else None
        edge_name = None if embedding_name is None else f"{embedding_name} of edges"
        self.learned = LearnedRows(name, dim, self._edge_dim(), embedding_name, edge_name)
        if dim is not None and dim != in_channels:
            self.embedding_lin = torch.nn.Linear(dim, in_channels, bias=False)

    def _edge_dim(self) -> int | None:
        """Columns of the learned rows of edges."""
        return None

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
        return DistributedGINConv(self._perceptron(in_channels, out_channels), **kwargs)

    def _perceptron(self, in_channels: int, out_channels: int) -> MLP:
        sizes = [in_channels, out_channels, out_channels]
        return MLP(sizes, act=self.act, act_first=self.act_first, norm=self.norm, norm_kwargs=self.norm_kwargs)

    def set_num_embeddings(
        self,
        num_nodes: int,
        num_edges: int | None = None,
        part_policy: Policy = None,
        edge_part_policy: Policy = None,
        init_func: InitFunc | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        r"""Makes the tables of learned rows (collective).

        Args:
            num_nodes (int): Rows for nodes.
            num_edges (int, optional): Rows for edges, where these are learned.
            part_policy (optional): Which worker keeps which node's row, such as the share; see
                :class:`~partpar.sharded.DistTensor`.
            edge_part_policy (optional): The same for edges.
            init_func (optional): First values, by default normal with variance ``1 / embedding_dim``.
            dtype (torch.dtype, optional): By default that of the weights.
        """
        self.learned.make(num_nodes, num_edges, part_policy, edge_part_policy, init_func, dtype or dtype_of(self))

    @property
    def embeddings(self) -> list[DistEmbedding]:
        r"""The tables of learned rows, for a sparse optimiser."""
        return self.learned.tables

    def forward(
        self,
        x: Tensor | SourceRows | None,
        edge_index: Tensor | Adjacency | Sequence[Adjacency],
        edge_attr: Tensor | Route | None = None,
        batch: Tensor | None = None,
        node_ids: Tensor | None = None,
        edge_ids: Tensor | None = None,
        route: Route | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        r"""Runs the model on owned rows (collective), or on the blocks of a sampled batch.

        Args:
            x (torch.Tensor, optional): ``[num_owned, in_channels]``; may be left out where rows are learned.
            edge_index (torch.Tensor or Adjacency): As for :meth:`BasicGNN.forward`.
            edge_attr (torch.Tensor, optional): ``[E, D]``, where layers take it. A route may stand in its place, as every
                model is called ``model(x, edges, route)``.
            batch (torch.Tensor, optional): ``[num_owned]`` int64, the graph of each node, numbered over all ranks.
                Outputs are then those of graphs, the same on every rank of the route.
            node_ids (torch.Tensor, optional): ``[num_owned]`` int64, whose learned rows the nodes have.
            edge_ids (torch.Tensor, optional): ``[E]`` int64, whose learned rows the edges have.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            batch_size (int, optional): Number of graphs; by default found (collective).

        Returns:
            ``[num_owned, out_channels]``, or ``[batch_size, out_channels]`` with :obj:`batch`.

        Raises:
            RouteError: Learned rows were asked for and :meth:`set_num_embeddings` was not called, or ids or rows are
                missing.
        """
        attr = None if isinstance(edge_attr, Route) else edge_attr
        route = edge_attr if isinstance(edge_attr, Route) else route
        of_nodes, of_edges = self.learned(node_ids, edge_ids)
        if of_nodes is not None and hasattr(self, "embedding_lin"):
            of_nodes = self.embedding_lin(of_nodes)
        rows = add_learned(type(self).__name__, x, of_nodes)  # type: ignore[arg-type]
        if of_edges is not None:
            attr = add_learned(type(self).__name__, attr, of_edges)
        if self.use_dist_tensor and route is not None and not (self.training or torch.is_grad_enabled()):
            assert isinstance(edge_index, Tensor | Adjacency)
            rows = rows.owned if isinstance(rows, SourceRows) else rows
            out = self._in_chunks(rows, edge_index, attr, route)
        else:
            out = super().forward(rows, edge_index, route, edge_attr=attr)
        return out if batch is None else self._pool(out, batch, route, batch_size)

    def _in_chunks(
        self, x: Tensor, edge_index: Tensor | Adjacency, edge_attr: Tensor | None, route: Route
    ) -> Tensor:
        """Layer by layer, between sharded tensors."""
        per_edge = {} if edge_attr is None else {"edge_attr": edge_attr}
        hidden = [shard(x, route)]
        for i in range(self.num_layers):

            def layer(pair: tuple[Tensor, Tensor], block: Adjacency, of: dict[str, Tensor], i: int = i) -> Tensor:
                return self._layer(i, pair, block, None, of)

            hidden.append(in_chunks(layer, hidden[-1], edge_index, route, per_edge, self.chunk_size))
            if not hasattr(self, "jk"):
                del hidden[0]
        if not hasattr(self, "jk"):
            return hidden[-1].local_rows
        pieces = zip(*(h.local_rows.split(self.chunk_size) for h in hidden[1:]), strict=True)
        out = torch.cat([self.jk(list(piece)) for piece in pieces])
        return self.lin(out) if hasattr(self, "lin") else out

    def _pool(self, rows: Tensor, batch: Tensor, route: Route | None, batch_size: int | None) -> Tensor:
        """Outputs of graphs, whose nodes may be on several ranks."""
        group = None if route is None else route.group
        if batch_size is None:
            here = int(batch.max()) + 1 if batch.numel() else 0
            batch_size = max(told["_graphs"] for told in exchange.agree(group, "pooling", {"_graphs": here}))
        out = exchange.all_reduce_sum(scatter(rows, batch, 0, batch_size, reduce="sum"), group)
        if self.pooling == "sum":
            return out
        count = torch.bincount(batch, minlength=batch_size).clamp_(min=0).to(rows.dtype)
        return out / exchange.all_reduce_sum(count, group).clamp(min=1).unsqueeze(1)


class DistributedGINE(DistributedGIN):
    r""":class:`DistributedGIN` of :class:`~partpar.nn.DistributedGINEConv` layers, which take edge attributes (`"Strategies
    for Pre-training Graph Neural Networks" <https://arxiv.org/abs/1905.12265>`_).

    Args:
        in_channels, hidden_channels, out_channels, num_layers: As for :class:`DistributedGIN`.
        edge_dim (int, optional): Columns of edge attributes, which each layer maps to its own width; without it they
            must have that width.
        use_dist_edge_embedding (bool, optional): Learn a row for each edge, which takes the place of
            :obj:`edge_attr`, or is added to it where it is given.
        edge_embedding_dim (int, optional): Columns of these rows. (default: :obj:`edge_dim`)
        **kwargs (optional): Arguments of :class:`DistributedGIN`.

    Raises:
        RouteError: Rows of edges are to be learned, and nothing says how many columns they have.
    """

    supports_edge_attr = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int | None,
        num_layers: int,
        *,
        edge_dim: int | None = None,
        use_dist_edge_embedding: bool = False,
        edge_embedding_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        if use_dist_edge_embedding:
            edge_embedding_dim = edge_embedding_dim or edge_dim
            edge_dim = edge_dim or edge_embedding_dim
            if edge_embedding_dim is None or edge_embedding_dim != edge_dim:
                raise RouteError(
                    f"DistributedGINE: expected edge_embedding_dim to be edge_dim, found {edge_embedding_dim} and {edge_dim}"
                )
        self._learned_edge_dim = edge_embedding_dim if use_dist_edge_embedding else None
        super().__init__(in_channels, hidden_channels, out_channels, num_layers, edge_dim=edge_dim, **kwargs)

    def _edge_dim(self) -> int | None:
        return self._learned_edge_dim

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
        return DistributedGINEConv(self._perceptron(in_channels, out_channels), **kwargs)
