r"""Many hops: what is sampled is the neighbourhood, in PyG's order, and the same for any number of parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph, load_npz_graph, npz_path
from parts import parts_of, serve, shares_of, typed_graph
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GraphSAGE
from torch_geometric.sampler import NegativeSampling

from partpar.graph import EDGE, NODE, EdgeType, GraphData
from partpar.graph.arrays import to_pyg
from partpar.sampling import BatchKey, LinkSeeds, NeighborSampler, SampledSubgraph, Seeds
from partpar.serving import start_service

Edges = Mapping[EdgeType, Tensor]
KEY = BatchKey(seed=3, epoch=1, batch=4)


def edges_of(data: Data | HeteroData) -> dict[EdgeType, Tensor]:
    return {EDGE: data.edge_index} if isinstance(data, Data) else dict(data.edge_index_dict)


def seeds_of(service: Any, node_type: str, raw_ids: Tensor, times: Tensor | None = None) -> Seeds:
    return Seeds(service.ids_of(node_type, raw_ids), raw_ids, times)


def in_pygs_order(
    node_types: list[str], edges: Edges, seeds: Mapping[str, list[int]], num_hops: int, disjoint: bool
) -> dict[str, Any]:
    r"""All neighbours, hop by hop, as PyG's compiled sampler goes: for each edge type in turn, each node that the last
    hop found takes its edges in their order, and a node seen for the first time is the next."""
    into: dict[EdgeType, dict[int, list[int]]] = {t: {} for t in edges}
    for edge_type, edge_index in edges.items():
        for edge, dst in enumerate(edge_index[1].tolist()):
            into[edge_type].setdefault(dst, []).append(edge)
    nodes: dict[str, list[tuple[int, int]]] = {t: [] for t in node_types}
    group = 0
    for node_type, ids in seeds.items():
        for node in ids:
            nodes[node_type].append((group if disjoint else 0, node))
            group += 1
    place = {t: {} for t in node_types}
    for node_type in node_types:
        for i, node in enumerate(nodes[node_type]):
            place[node_type].setdefault(node, i)
    out: dict[EdgeType, list[tuple[int, int, int]]] = {t: [] for t in edges}
    num_nodes = {t: [len(nodes[t])] for t in node_types}
    num_edges: dict[EdgeType, list[int]] = {t: [] for t in edges}
    begin = dict.fromkeys(node_types, 0)
    for _ in range(num_hops):
        end = {t: len(nodes[t]) for t in node_types}
        for edge_type, edge_index in edges.items():
            src, _, dst = edge_type
            before = len(out[edge_type])
            for i in range(begin[dst], end[dst]):
                tree, node = nodes[dst][i]
                for edge in into[edge_type].get(node, []):
                    source = (tree, int(edge_index[0, edge]))
                    if source not in place[src]:
                        place[src][source] = len(nodes[src])
                        nodes[src].append(source)
                    out[edge_type].append((place[src][source], i, edge))
            num_edges[edge_type].append(len(out[edge_type]) - before)
        for node_type in node_types:
            num_nodes[node_type].append(len(nodes[node_type]) - end[node_type])
        begin = end
    return {
        "raw_ids": {t: [n for _, n in nodes[t]] for t in node_types},
        "batch": {t: [g for g, _ in nodes[t]] for t in node_types} if disjoint else None,
        "row": {t: [e[0] for e in out[t]] for t in edges},
        "col": {t: [e[1] for e in out[t]] for t in edges},
        "edge": {t: [e[2] for e in out[t]] for t in edges},
        "num_sampled_nodes": num_nodes,
        "num_sampled_edges": num_edges,
    }


def as_lists(out: SampledSubgraph) -> dict[str, Any]:
    r"""All that does not depend on the numbering of a partition."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    told = {
        f.name: plain(getattr(out, f.name))
        for f in fields(out)
        if f.name not in ("ids", "edge_rows", "labels")
    }
    if out.labels is not None:
        told["labels"] = {f.name: plain(getattr(out.labels, f.name)) for f in fields(out.labels)}
    return told


# --- truth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disjoint", [False, True], ids=["together", "disjoint"])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("kind", ["directed", "typed"])
def test_all_neighbours_come_in_pygs_order(kind: str, num_parts: int, disjoint: bool, tmp_path: Path) -> None:
    data = directed_graph() if kind == "directed" else typed_graph()
    parts = parts_of(data, num_parts, tmp_path)
    seeds = {NODE: [5, 3, 57, 0, 3]} if kind == "directed" else {"paper": [7, 2, 2, 40], "author": [3, 9]}
    sampler = NeighborSampler(parts, [-1, -1, -1], disjoint=disjoint)
    out = sampler.sample_nodes({t: seeds_of(parts, t, torch.tensor(ids)) for t, ids in seeds.items()}, KEY)
    assert as_lists(out) == in_pygs_order(parts.node_types, edges_of(data), seeds, 3, disjoint)


def hops_into(edges: Edges, node_types: dict[str, int], seeds: Mapping[str, Tensor], num_hops: int) -> tuple:
    r"""The k-hop in-neighbourhood by marking: nodes, and edges into what k - 1 hops reach."""
    reached = {t: torch.zeros(n, dtype=torch.bool) for t, n in node_types.items()}
    for node_type, ids in seeds.items():
        reached[node_type][ids] = True
    taken = {t: torch.zeros(e.size(1), dtype=torch.bool) for t, e in edges.items()}
    for _ in range(num_hops):
        after = {t: mask.clone() for t, mask in reached.items()}
        for edge_type, edge_index in edges.items():
            into = reached[edge_type[2]][edge_index[1]]
            taken[edge_type] |= into
            after[edge_type[0]][edge_index[0][into]] = True
        reached = after
    return reached, taken


@pytest.mark.parametrize("name", ["directed", "cora", "dblp_hetero"])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_unlimited_fanout_is_the_neighbourhood(name: str, num_parts: int, tmp_path: Path) -> None:
    data = (
        directed_graph() if name == "directed" else load_npz_graph("cora") if name == "cora" else dblp_graph()
    )
    seed_type = "author" if name == "dblp_hetero" else NODE
    parts = parts_of(data, num_parts, tmp_path)
    sampler = NeighborSampler(parts, [-1, -1])
    sizes = {t: int(parts.offsets(t)[-1]) for t in parts.node_types}
    order = torch.randperm(sizes[seed_type], generator=torch.Generator().manual_seed(0))
    for batch, raw_ids in enumerate(order[:60].split(20)):
        out = sampler.sample_nodes({seed_type: seeds_of(parts, seed_type, raw_ids)}, BatchKey(batch=batch))
        reached, taken = hops_into(edges_of(data), sizes, {seed_type: raw_ids}, 2)
        for node_type, mask in reached.items():
            assert out.raw_ids[node_type].sort().values.tolist() == mask.nonzero().flatten().tolist()
            assert torch.equal(parts.ids_of(node_type, out.raw_ids[node_type]), out.ids[node_type])
        for edge_type, mask in taken.items():
            edge = out.edge[edge_type]
            assert edge is not None
            assert edge.sort().values.tolist() == mask.nonzero().flatten().tolist()
            ends = torch.stack(
                [
                    out.raw_ids[edge_type[0]][out.row[edge_type]],
                    out.raw_ids[edge_type[2]][out.col[edge_type]],
                ]
            )
            assert torch.equal(ends, edges_of(data)[edge_type][:, edge])


def dblp_graph() -> HeteroData:
    r"""Authors, papers, conferences and terms, with edges both ways."""
    with np.load(npz_path("dblp_hetero"), allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key.startswith(("num_nodes", "edge_index"))}
    data = to_pyg(arrays)
    assert isinstance(data, HeteroData)
    for src, name, dst in data.edge_types:
        data[dst, f"rev_{name}", src].edge_index = data[src, name, dst].edge_index.flip(0)
    return data


@torch.no_grad()
def test_graphsage_gives_what_it_gives_on_the_whole_graph(tmp_path: Path) -> None:
    data = load_npz_graph("cora")
    parts = parts_of(data, 3, tmp_path)
    torch.manual_seed(0)
    x = data.x.double()
    model = GraphSAGE(x.size(1), 16, 2, 7).double().eval()
    expected = model(x, data.edge_index)
    sampler = NeighborSampler(parts, [-1, -1])
    for batch, raw_ids in enumerate(torch.arange(2708).split(900)):
        out = sampler.sample_nodes({NODE: seeds_of(parts, NODE, raw_ids)}, BatchKey(batch=batch))
        logits = model(x[out.raw_ids[NODE]], torch.stack([out.row[EDGE], out.col[EDGE]]))[: raw_ids.numel()]
        assert float((logits - expected[raw_ids]).abs().max()) < 1e-10


# --- the same for any number of parts -------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "replace": {"replace": True},
    "disjoint": {"disjoint": True},
    "weighted": {"weight_attr": "weight"},
    "weighted replace": {"weight_attr": "weight", "replace": True},
    "induced": {"subgraph_type": "induced"},
    "induced disjoint": {"subgraph_type": "induced", "disjoint": True},
    "bidirectional": {"subgraph_type": "bidirectional"},
    "temporal": {"time_attr": "time"},
    "last": {"time_attr": "time", "temporal_strategy": "last"},
    "temporal induced": {"time_attr": "time", "subgraph_type": "induced"},
}


def sample_batches(service: Any, options: dict[str, Any], links: bool = True) -> list[dict[str, Any]]:
    r"""Batches from nodes, from links, and from links with negatives of both kinds."""
    homogeneous = len(service.node_types) == 1
    hops: Any = (
        [3, 2] if homogeneous else {t: [3, 2] if t[1] != "in" else [1, -1] for t in service.edge_types}
    )
    sampler = NeighborSampler(service, hops, **options)
    kind = NODE if homogeneous else "paper"
    link = EDGE if homogeneous else ("author", "writes", "paper")
    raw_ids = torch.tensor([5, 1, 20, 28, 5])
    times = torch.tensor([50, 99, 3, 20, 70]) if "time_attr" in options else None
    out = [
        sampler.sample_nodes(
            {kind: seeds_of(service, kind, raw_ids, times)}, BatchKey(seed=1, epoch=e, batch=b)
        )
        for e in range(2)
        for b in range(2)
    ]
    if links:
        seeds = LinkSeeds(
            link,
            seeds_of(service, link[0], raw_ids),
            seeds_of(service, link[2], raw_ids.flip(0)),
            None,
            times,
        )
        for negatives in (None, NegativeSampling("binary", 1.4), NegativeSampling("triplet", 2)):
            out.append(sampler.sample_edges(seeds, KEY, negatives, strict_negatives=True))
    return [as_lists(one) for one in out]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["directed", "typed"])
def test_any_number_of_parts_samples_the_same(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = sample_batches(parts_of(with_times(kind), 1, tmp_path), options)
    # Epochs and batches differ, where anything is drawn at all.
    assert len({str(one) for one in expected[:4]}) == (1 if "temporal_strategy" in options else 4)
    for num_parts in (2, 3, 4):
        assert sample_batches(parts_of(with_times(kind), num_parts, tmp_path), options) == expected


def sample_on_a_rank(worker: Worker, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    share = GraphData.load_partition(folder, worker.rank, worker.world_size, algorithm="random")
    with start_service(share) as service:
        return sample_batches(service, options)


@pytest.mark.parametrize("num_parts", [2, pytest.param(3, marks=pytest.mark.soak), 4])
def test_any_process_samples_the_same(gang: Gang, num_parts: int, tmp_path: Path) -> None:
    options = {"time_attr": "time", "weight_attr": "weight"}
    expected = sample_batches(parts_of(with_times("typed"), 1, tmp_path), options)
    shares_of(with_times("typed"), num_parts, tmp_path)
    for told in gang.run(sample_on_a_rank, num_parts, tmp_path, options):
        assert told == expected


def with_times(kind: str) -> Data | HeteroData:
    if kind == "typed":
        return typed_graph()
    data = directed_graph()
    data.weight = data.edge_weight
    data.time = torch.randint(100, (275,), generator=torch.Generator().manual_seed(5))
    return data


def test_a_graph_that_was_never_cut_is_one_part(tmp_path: Path) -> None:
    data = with_times("directed")
    expected = sample_batches(parts_of(data, 1, tmp_path), {})
    share = GraphData.load_partition(tmp_path, 0, 1, algorithm="random")
    assert sample_batches(start_service(share), {}) == expected
    order = data.edge_index[1].argsort(stable=True)
    told = sample_batches(serve([GraphData.from_pyg_data(data.edge_subgraph(order))]), {}, links=False)
    for ours, whole in zip(told, expected, strict=False):
        assert ours["raw_ids"] == whole["raw_ids"]
        assert order[torch.tensor(ours["edge"][EDGE])].tolist() == whole["edge"][EDGE]


# --- kinds of sub-graphs --------------------------------------------------------------------------------------------


def test_induced_holds_all_edges_between_the_nodes(tmp_path: Path) -> None:
    data = typed_graph()
    parts = parts_of(data, 2, tmp_path)
    sampler = NeighborSampler(parts, [3, 2], subgraph_type="induced")
    out = sampler.sample_nodes({"paper": seeds_of(parts, "paper", torch.arange(5))}, KEY)
    assert out.num_sampled_nodes is None
    assert out.num_sampled_edges is None
    for edge_type, edge_index in data.edge_index_dict.items():
        inside = torch.isin(edge_index[0], out.raw_ids[edge_type[0]]) & torch.isin(
            edge_index[1], out.raw_ids[edge_type[2]]
        )
        edge = out.edge[edge_type]
        assert edge is not None
        assert edge.sort().values.tolist() == inside.nonzero().flatten().tolist()
        assert torch.equal(out.raw_ids[edge_type[0]][out.row[edge_type]], edge_index[0, edge])
        assert torch.equal(out.raw_ids[edge_type[2]][out.col[edge_type]], edge_index[1, edge])


@pytest.mark.parametrize("kind", ["directed", "typed"])
def test_bidirectional_is_pygs(kind: str, tmp_path: Path) -> None:
    data = with_times(kind)
    parts = parts_of(data, 2, tmp_path)
    node_type = NODE if kind == "directed" else "paper"
    seeds = {node_type: seeds_of(parts, node_type, torch.arange(6))}
    directional = NeighborSampler(parts, [3, 2]).sample_nodes(seeds, KEY)
    with pytest.warns(UserWarning, match="leads back") if kind == "typed" else nullcontext():
        out = NeighborSampler(parts, [3, 2], subgraph_type="bidirectional", with_edge_rows=True).sample_nodes(
            seeds, KEY
        )
    with pytest.warns(UserWarning, match="reverse edge type") if kind == "typed" else nullcontext():
        expected: Any = directional.to_pyg(kind == "directed").to_bidirectional()
    ours: Any = out.to_pyg(kind == "directed")
    if kind == "directed":
        assert torch.equal(torch.stack([ours.row, ours.col]), torch.stack([expected.row, expected.col]))
        ends = data.edge_index[:, ours.edge]
        found = torch.stack([ours.node[ours.row], ours.node[ours.col]])
        assert bool(((found == ends).all(0) | (found == ends.flip(0)).all(0)).all())
    else:
        for edge_type in expected.row:
            assert torch.equal(ours.row[edge_type], expected.row[edge_type])
            assert torch.equal(ours.col[edge_type], expected.col[edge_type])
    assert ours.num_sampled_nodes is expected.num_sampled_nodes is None
