r"""The cost model finds the rates that made its cases, counts what a report says, and is told on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from partpar import GraphData, datasets
from partpar.cli.main import main
from partpar.training.cost import (
    Case,
    CostError,
    Network,
    Part,
    Rates,
    Training,
    even_parts,
    fit,
    parts_of,
    predict,
    work,
)

RATES = Rates(2e-10, 3e-11, 4e-10, 5e-10, 3e-3, 1e8, 30.0, 2.5, 1.5)


def _cases(rates: Rates) -> list[Case]:
    r"""As if measured on machines of these rates, on their own network."""
    told = []
    for i, (features, hidden) in enumerate(((128, 128), (64, 64), (32, 256), (256, 32), (16, 16))):
        for halo in (0.0, 0.3 + i / 10):
            parts = even_parts(1e5 * (1 + i % 3), 1e6 * (1 + i), 4, halo, halo / 3)
            training = Training("gcn", features, hidden)
            found = predict(parts, training, None, rates)
            told.append(Case(parts, training, None, found.seconds, found.memory))
    return told


def test_fit_finds_the_rates_that_made_the_cases() -> None:
    for name, value in asdict(fit(_cases(RATES))).items():
        assert value == pytest.approx(getattr(RATES, name), rel=1e-5), name


def test_fit_keeps_rates_from_falling_below_zero() -> None:
    cases = [replace(case, seconds=1.0 / (1 + i)) for i, case in enumerate(_cases(RATES))]
    assert min(asdict(fit(cases)).values()) >= 0


def test_fit_leaves_other_networks_out_and_refuses_too_few_cases() -> None:
    cases = _cases(RATES)
    odd = [replace(case, network=Network(1.0), seconds=99.0) for case in cases]
    assert fit([*odd, *cases]) == fit(cases)
    with pytest.raises(CostError, match="at least 5 epochs .* found 4"):
        fit([*odd, *cases[:4]])


def test_work_is_what_the_layers_do() -> None:
    part = Part(owned=10, halo=3, edges=40, cut_edges=7, sent=5)
    summed, multiplied, rows, moved, epochs = work(
        part, Training("sage", features=6, hidden=4, classes=2, layers=3)
    )
    assert summed == 2 * 40 * ((4 * 4 + 8) + (2 * 4 + 8)), (
        "forwards and backwards; the first layer's are kept"
    )
    assert multiplied == 2 * 10 * (2 * 6 * 4 + 3 * 4 * 4 + 3 * 4 * 2)
    assert rows == 4 * 10 * ((6 + 4) + (4 + 4) + (4 + 2))
    assert moved == 2 * 4 * (3 + 5) * (4 + 2)
    assert epochs == 1


def test_a_network_is_waited_for_only_beyond_the_interior() -> None:
    parts, training = even_parts(1e5, 4e6, 2, 0.2, 0.05), Training()
    alone = predict(parts, training, None, RATES)
    fast, slow, slower = (predict(parts, training, Network(gbit, 0.0), RATES) for gbit in (1000.0, 1.0, 0.5))
    assert fast.visible == 0
    assert fast.seconds == alone.seconds
    assert slow.exchange == pytest.approx(2 * 0.2 * 5e4 * 4 * (128 + 32) * 8 / 1e9)
    assert slower.exchange == pytest.approx(2 * slow.exchange)
    assert slower.visible >= slow.visible
    assert slower.seconds == pytest.approx(alone.seconds + slower.visible)
    shared = predict(parts, training, Network(1.0, 0.0, ranks_per_machine=2), RATES)
    assert shared.exchange == pytest.approx(slower.exchange), "two ranks behind one interface"
    assert predict(parts, Training(layers=1), Network(1.0), RATES).bytes_sent == 0, (
        "a first layer sends nothing"
    )


def test_the_slowest_and_the_largest_part_count() -> None:
    small, large = Part(10, 0, 100, 0, 0), Part(1e5, 1e4, 1e6, 1e4, 1e4)
    assert (
        predict([small, large], Training(), None, RATES).seconds
        == predict([large], Training(), None, RATES).seconds
    )
    assert (
        predict([large, small], Training(), None, RATES).memory
        == predict([large], Training(), None, RATES).memory
    )


@pytest.mark.parametrize("wrong", [{"model": "gat"}, {"hidden": 0}, {"layers": 0}])
def test_impossible_trainings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CostError, match="expected a model of gcn, sage"):
        Training(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = datasets.planted(200, num_features=24, degree=6)
    return GraphData.from_pyg_data(data).partition_graph(tmp_path, num_parts=3)


def test_parts_are_those_of_the_report(folder: Path) -> None:
    report = json.loads((folder / "manifest.json").read_text())["report"]
    parts = parts_of(report)
    for rank, part in enumerate(parts):
        share = GraphData.load_partition(folder.parent, rank, 3)
        assert (part.owned, part.halo, part.edges) == (share.num_owned(), share.num_halo(), share.num_edges())
    assert sum(part.sent for part in parts) == sum(part.halo for part in parts)
    report["nodes"]["other"] = report["nodes"]["node"]
    with pytest.raises(CostError, match="one node type"):
        parts_of(report)


def test_inspect_predicts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["inspect", str(folder), "--predict", "--gbit", "1"]) == 0
    assert "2-layer" not in (printed := capsys.readouterr().out)
    assert "peak memory of a rank" in printed

    def told(*more: str) -> dict[str, float]:
        assert main(["inspect", str(folder), "--predict", "--json", *more]) == 0
        cost: dict[str, float] = json.loads(capsys.readouterr().out)["prediction"]
        return cost

    parts = parts_of(json.loads((folder / "manifest.json").read_text())["report"])
    found = told("--gbit", "0.001", "--layers", "2", "--classes", "7", "--model", "sage")
    wanted = predict(parts, Training("sage", 24, 128, 7, 2), Network(0.001))
    assert {name: found[name] for name in asdict(wanted)} == asdict(wanted)
    assert told("--machines", "1")["exchange"] == 0
    assert told("--machines", "2")["exchange"] > told()["exchange"]
    RATES.write(tmp_path / "rates.json")
    assert (
        told("--rates", str(tmp_path / "rates.json"))["memory"]
        == predict(parts, Training("gcn", 24), None, RATES).memory
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--machines", "4"], "expected 1 to 3"),
        (["--gbit", "0"], "--gbit above 0"),
        (["--hidden", "0"], "sizes from 1"),
        (["--rates", "{tmp}/none.json"], "No such file"),
        (["--rates", "{tmp}/odd.json"], "expected a JSON object of numbers"),
    ],
)
def test_inspect_says_what_it_cannot_predict(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], reason: str
) -> None:
    (tmp_path / "odd.json").write_text('{"summed_byte": 1}')
    assert main(["inspect", str(folder), "--predict", *(o.format(tmp=tmp_path) for o in options)]) == 1
    assert reason in capsys.readouterr().err
