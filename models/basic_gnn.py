r"""What the models have in common: PyG's model zoo, one worker's rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn.models.basic_gnn import BasicGNN as PyGBasicGNN

from partpar.kernels.adjacency import Adjacency
from partpar.nn import rows
from partpar.nn.dropout import Dropout
from partpar.nn.norm import with_global_statistics
from partpar.nn.recompute import run_again
from partpar.nn.source_rows import SourceRows
from partpar.nn.streamed import Stages, row_wise, streamed
from partpar.route import Route


class BasicGNN(PyGBasicGNN):
    r"""Layers of one kind with activations, norms, dropout and jumping knowledge between them.

    Arguments and parameters are those of PyG's models, and so are the keys of the ``state_dict``: weights
    move both ways with ``load_state_dict``. Only with dropout there are step counters more, which PyG's
    models know nothing of.

    Args:
        in_channels (int): Size of each input row.
        hidden_channels (int): Size of each hidden row.
        num_layers (int): Number of message passing layers.
        out_channels (int, optional): Size of each output row; :obj:`None` means :obj:`hidden_channels`.
        dropout (float, optional): Dropout probability; draws are by raw id, see :class:`~partpar.nn.Dropout`.
            (default: :obj:`0.`)
        act (str or Callable, optional): The activation. (default: :obj:`"relu"`)
        act_first (bool, optional): Whether activation comes before the norm. (default: :obj:`False`)
        act_kwargs (dict, optional): Arguments of the activation.
        norm (str or Callable, optional): The norm, by PyG's name; ``"batch_norm"`` is
            :class:`~partpar.nn.SyncBatchNorm`. (default: :obj:`None`)
        norm_kwargs (dict, optional): Arguments of the norm.
        jk (str, optional): Jumping knowledge: ``"last"``, ``"cat"``, ``"max"`` or ``"lstm"``, then a linear
            layer.
        seed (int, optional): The seed of dropout. (default: :obj:`0`)
        recompute (bool, optional): Whether layers are run again in the backward pass, exchange included, instead
            of keeping their halo rows and activations: less memory, more time. (default: :obj:`False`)
        **kwargs (optional): Arguments of the layers.

    Raises:
        ValueError: The norm has statistics over all rows and no partition-parallel counterpart.
    """

    norms: torch.nn.ModuleList

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        *args: Any,
        seed: int = 0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        self._seed, self.recompute = seed, recompute
        super().__init__(in_channels, hidden_channels, num_layers, out_channels, *args, **kwargs)
        self.norms = torch.nn.ModuleList(
            with_global_statistics(norm, type(self).__name__) for norm in self.norms
        )
        # Even numbers for rows; attention, where there is any, takes the odd ones.
        self.dropouts = torch.nn.ModuleList(Dropout(self.dropout.p, seed, 2 * i) for i in range(num_layers))
        del self.dropout

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters, and the step counters of dropout."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, Dropout):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor | SourceRows,
        edge_index: Tensor | Adjacency | Sequence[Adjacency],
        route: Route | None = None,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the model on owned rows (collective), or on the blocks of a sampled batch.

        Args:
            x (torch.Tensor or SourceRows): ``[num_owned, in_channels]``, the rows of the owned nodes; constant rows
                may come with their halo from :func:`~partpar.nn.keep_halo`, so that the first layer sends nothing.
            edge_index (torch.Tensor or Adjacency): The share's edges: ``share.adj()``, the fast way, or ``[2, E]``. Or
                the edges that each layer needs, as :func:`partpar.sampling.blocks` takes them from a sampled batch;
                :obj:`x` then has a row for each of the batch's nodes, and the result one for each seed.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            edge_weight (torch.Tensor, optional): ``[E]``, where layers support it.
            edge_attr (torch.Tensor, optional): ``[E, D]``, where layers support it.

        Returns:
            ``[num_owned, out_channels]``.
        """
        per_edge: dict[str, Tensor] = {}
        for name, value, supported in (
            ("edge_weight", edge_weight, self.supports_edge_weight),
            ("edge_attr", edge_attr, self.supports_edge_attr),
        ):
            if value is not None and not supported:
                raise ValueError(
                    f"{type(self).__name__}: expected no {name}, since its layers do not use any, found "
                    f"one of shape {tuple(value.shape)}"
                )
            if value is not None:
                per_edge[name] = value

        if isinstance(edge_index, Sequence):
            assert isinstance(x, Tensor)
            return self._on_blocks(x, edge_index, route, per_edge)
        again = self.recompute and torch.is_grad_enabled()
        streams = again and self._streams(x, edge_index, per_edge)
        layer: Callable[..., Tensor] = self._streamed_layer if streams else self._layer
        if again and not hasattr(self, "jk"):
            out = self._span(layer, 0, self.num_layers, x, edge_index, route, per_edge)
        else:
            hidden: list[Tensor | SourceRows] = [x]
            for i in range(self.num_layers):
                arguments = (i, hidden[-1], edge_index, route, per_edge)
                hidden.append(run_again(layer, *arguments) if again and not streams else layer(*arguments))
            out = self.jk(hidden[1:]) if hasattr(self, "jk") else hidden[-1]  # type: ignore[assignment]
        return self.lin(out) if hasattr(self, "lin") else out

    def _on_blocks(
        self, x: Tensor, blocks: Sequence[Adjacency], route: Route | None, per_edge: dict[str, Tensor]
    ) -> Tensor:
        """Each layer reads its own block, whose destinations are the sources of the next."""
        if len(blocks) != self.num_layers or route is not None:
            raise ValueError(
                f"{type(self).__name__}: expected a block for each of {self.num_layers} layers and no route, found "
                f"{len(blocks)} and {'no' if route is None else 'a'} route; sample as many hops as there are layers"
            )
        hidden = [x]
        for i, block in enumerate(blocks):  # the edges of a block are the first of the batch's
            of_block = {name: values[: block.num_edges] for name, values in per_edge.items()}
            hidden.append(self._layer(i, hidden[-1], block, None, of_block))
        of_seeds = [rows[: hidden[-1].size(0)] for rows in hidden[1:]]
        out: Tensor = self.jk(of_seeds) if hasattr(self, "jk") else of_seeds[-1]
        return self.lin(out) if hasattr(self, "lin") else out

    def _streams(self, x: Tensor | SourceRows, edge_index: object, per_edge: dict[str, Tensor]) -> bool:
        """Whether layers may go over their rows piece by piece."""
        return (
            isinstance(edge_index, Adjacency)
            and edge_index.num_dst == rows.owned(x).size(0)
            and not any(name == "edge_attr" or values.requires_grad for name, values in per_edge.items())
            and all(getattr(conv, "streams", False) for conv in self.convs)
            and all(row_wise(module) for module in (*self.norms, self.act))
        )

    def _span(
        self,
        layer: Callable[..., Tensor],
        first: int,
        last: int,
        x: Tensor | SourceRows,
        *arguments: Any,
    ) -> Tensor:
        """Layers ``first`` to ``last - 1``, of which all but the last third are run again in the backward pass, and
        each piece likewise: what is kept grows with the logarithm of the number of layers (Griewank, "Achieving
        logarithmic growth of temporal and spatial complexity in reverse automatic differentiation", 1992)."""
        if last - first == 1:
            return layer(first, x, *arguments)
        middle = last - max(1, (last - first) // 3)
        x = run_again(self._span, layer, first, middle, x, *arguments)
        return self._span(layer, middle, last, x, *arguments)

    def _layer(
        self,
        i: int,
        x: Tensor | SourceRows,
        edge_index: Tensor | Adjacency,
        route: Route | None,
        per_edge: dict[str, Tensor],
    ) -> Tensor:
        """One convolution and what follows it, from owned rows to owned rows."""
        return self._follow(i, self.convs[i](x, edge_index, route, **per_edge), route)

    def _streamed_layer(
        self,
        i: int,
        x: Tensor | SourceRows,
        adj: Adjacency,
        route: Route | None,
        per_edge: dict[str, Tensor],
    ) -> Tensor:
        """The same, piece by piece."""
        stages: Stages = self.convs[i].stages(x, adj, route, **per_edge)
        modules = (self.convs[i], self.norms[i], self.act)
        private = not hasattr(self, "jk") and i < self.num_layers - 1
        return streamed(stages.then(partial(self._follow, i)), x, route, modules, private)

    def _follow(self, i: int, out: Tensor, route: Route | None) -> Tensor:
        if i == self.num_layers - 1 and self.jk_mode is None:
            return out
        if self.act is not None and self.act_first:
            out = self.act(out)
        out = rows.call(self.norms[i], out, route)
        if self.act is not None and not self.act_first:
            out = self.act(out)
        dropped: Tensor = self.dropouts[i](out, route)
        return dropped
