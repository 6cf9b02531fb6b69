r"""Writes small generated graphs in the layouts that the examples read, for machines without data of their own.

.. code-block:: console

    python examples/support/make_graphs.py graphs

``typed.npz`` is a bibliographic network, ``temporal.npz`` messages over time, ``bare.npz`` a graph without features, and
``rings.npz`` a set of whole graphs; see :func:`partpar.datasets.from_npz` for the layouts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from partpar import datasets


def main() -> None:
    r"""Writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for make in (typed, temporal, bare, rings):
        path = args.folder / f"{make.__name__}.npz"
        np.savez_compressed(path, **make(np.random.default_rng(args.seed)))
        print(path)


def typed(draw: np.random.Generator) -> dict[str, np.ndarray]:
    r"""Authors write papers of their field; papers appear at conferences and contain terms."""
    authors, papers, conferences, terms, fields = 300, 600, 8, 160, 4
    field, topic = draw.integers(fields, size=authors), draw.integers(fields, size=papers)
    writes = np.stack([draw.integers(authors, size=1500), draw.integers(papers, size=1500)])
    writes = writes[:, (field[writes[0]] == topic[writes[1]]) | (draw.random(1500) < 0.1)]
    contains = np.stack([np.repeat(np.arange(papers), 5), draw.integers(terms // fields, size=5 * papers)])
    contains[1] += topic[contains[0]] * (terms // fields)
    role = draw.permutation(authors) % 4
    return {
        "edge_index__author__writes__paper": writes,
        "edge_index__paper__published_in__conf": np.stack([np.arange(papers), topic * 2 + draw.integers(2, size=papers)]),
        "edge_index__paper__contains__term": contains,
        "x__author": (np.eye(fields)[field] + draw.normal(0, 1, (authors, fields))).astype(np.float32),
        "x__paper": (np.eye(fields)[topic] + draw.normal(0, 1, (papers, fields))).astype(np.float32),
        "y__author": field,
        "train_mask__author": role < 2,
        "val_mask__author": role == 2,
        "test_mask__author": role == 3,
        **{f"num_nodes__{t}": np.array(n) for t, n in (("author", authors), ("paper", papers), ("conf", conferences), ("term", terms))},
    }


def temporal(draw: np.random.Generator) -> dict[str, np.ndarray]:
    r"""Messages within circles of friends, over time."""
    nodes, messages = 200, 4000
    source = draw.integers(nodes, size=messages)
    near = (source + draw.integers(1, 6, size=messages)) % nodes
    target = np.where(draw.random(messages) < 0.9, near, draw.integers(nodes, size=messages))
    return {"src": source, "dst": target, "t": np.sort(draw.integers(10**6, size=messages)), "num_nodes": np.array(nodes)}


def bare(draw: np.random.Generator) -> dict[str, np.ndarray]:
    r"""A graph with communities, labels and masks, and no features."""
    data = datasets.planted(600, seed=int(draw.integers(2**31)))
    kept = {name: data[name].numpy() for name in ("edge_index", "y", "train_mask", "val_mask", "test_mask")}
    return {**kept, "num_nodes": np.array(data.num_nodes)}


def rings(draw: np.random.Generator) -> dict[str, np.ndarray]:
    r"""Rings of six to ten nodes, of which half have a chord."""
    edges, node_ptr, edge_ptr, chords = [], [0], [0], np.arange(60) % 2
    for chord in chords:
        size = int(draw.integers(6, 11))
        pairs = [(i, (i + 1) % size) for i in range(size)] + [(0, size // 2)] * int(chord)
        both = np.array(pairs + [(b, a) for a, b in pairs]).T
        edges.append(both + node_ptr[-1])
        node_ptr.append(node_ptr[-1] + size)
        edge_ptr.append(edge_ptr[-1] + both.shape[1])
    return {
        "edge_index": np.concatenate(edges, axis=1),
        "node_ptr": np.array(node_ptr),
        "edge_ptr": np.array(edge_ptr),
        "node_label": draw.integers(3, size=node_ptr[-1]),
        "edge_label": draw.integers(2, size=edge_ptr[-1]),
        "y": chords,
    }


if __name__ == "__main__":
    main()
