r"""Reports of runs, TensorBoard scalars and predictions of a cut: what they show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from partpar import GraphData, datasets, training
from partpar.cli import charts
from partpar.cli.main import main
from partpar.cli.quality import draw
from partpar.partition import read_manifest
from partpar.partition.forecast import forecast, is_symmetric
from partpar.training.run_log import RunLogError, read_runs
from partpar.training.scalars import ScalarsError

END = {"phase_seconds": {"compute": [1.0, 2.0], "exchange": [0.5, 0.25]}, "traffic": [[0, 7], [5, 0]], "peak_bytes": [1 << 20, 3 << 20]}


def _log(path: Path, runs: int = 1, end: bool = True) -> Path:
    log = training.JsonLines(path)
    for _ in range(runs):
        for epoch in range(1, 6):
            log.write(epoch=epoch, loss=2.0 / epoch, val=0.1 * epoch, test=float("nan"), seconds=0.5, exchange_seconds=0.1)
        if end:
            log.write(**END)
    return path


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str, kind: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag and attrs.get("class") == kind]


def test_a_report_draws_curves_phases_and_traffic(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(_log(tmp_path / "run.jsonl")), "-o", str(page)]) == 0
    assert "1 run(s) drawn" in capsys.readouterr().out
    tags = _Tags(page.read_text())
    curves = {c["data-name"]: c for c in tags.of("polyline", "curve")}
    assert set(curves) == {"loss", "val", "seconds", "exchange seconds"}, "a curve of NaN alone is none"
    heights = [float(p.split(",")[1]) for p in str(curves["loss"]["points"]).split()]
    assert len(heights) == 5
    assert heights == sorted(heights), "the loss falls, and heights are counted from above"
    widths = [(b["data-name"], b["data-row"], float(str(b["width"]))) for b in tags.of("rect", "bar")]
    assert [w[:2] for w in widths] == [("compute", "0"), ("exchange", "0"), ("compute", "1"), ("exchange", "1")]
    assert widths[2][2] == pytest.approx(2 * widths[0][2], abs=0.2)
    assert [c["data-value"] for c in tags.of("rect", "cell")] == ["0", "7", "5", "0"]
    assert not [tag for tag, attrs in tags.found if tag in ("script", "link", "img", "iframe") or "src" in attrs or "href" in attrs]


def test_a_report_of_several_runs_and_of_one_that_was_killed(tmp_path: Path) -> None:
    assert [len(run.epochs) for run in read_runs(_log(tmp_path / "two.jsonl", 2, end=False))] == [5, 5]
    assert main(["report", str(tmp_path / "two.jsonl"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Run 2 of 2" in page
    assert "The log does not tell" in page


def test_phases_of_epochs_are_added_up(tmp_path: Path) -> None:
    log = training.JsonLines(tmp_path / "run.jsonl")
    for epoch in (1, 2):
        log.write(epoch=epoch, loss=1.0, phase_seconds={"batches": [0.5, 0.25], "compute": [1.0, 2.0]})
    (run,) = read_runs(tmp_path / "run.jsonl")
    assert run.phase_seconds == {"batches": [1.0, 0.5], "compute": [2.0, 4.0]}


def test_names_from_a_log_are_text_in_the_page(tmp_path: Path) -> None:
    (tmp_path / "<b>.jsonl").write_text(json.dumps({"epoch": 1, "<script>alert(1)</script>": 2.0}))
    assert main(["report", str(tmp_path / "<b>.jsonl"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(("text", "message"), [("", "found none"), ("x\n", "line 1: expected a JSON object"), ("[1]\n", "found list"), ("{}", "lines with an epoch")])
def test_what_is_no_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(RunLogError, match=message):
        read_runs(tmp_path / "run.jsonl")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1e9), (1e-9, 3e-9), (5, 6)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-12) for tick in ticks)


def test_a_training_ends_its_log_with_figures_of_every_rank(tmp_path: Path) -> None:
    from partpar.models import GCN

    graph = GraphData.from_pyg_data(datasets.karate())
    graph.partition_graph(tmp_path, 1)
    share = GraphData.load_partition(tmp_path, 0, 1)
    model = GCN(share.node()["x"].size(1), 4, 1, 4)
    history = training.fit(model, torch.optim.SGD(model.parameters(), 0.1), share, share.to_route(), epochs=2)
    assert set(history.record) == set(END)
    assert [len(seconds) for seconds in history.phase_seconds.values()] == [1, 1, 1]
    assert history.traffic == [[0]]
    assert history.phase_seconds["evaluation"][0] > 0


def test_scalars_are_read_back_by_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = training.Scalars(tmp_path)
    for epoch in (1, 2):
        scalars.write(epoch, loss=1.0 / epoch, val=float("nan"))
    scalars.close()
    log = training.RunLog(tmp_path / "run.jsonl", tmp_path / "log")
    log.write(epoch=3, seed=1, loss=0.5, name="x")
    log.write(mean=1.0)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 2
    seeded = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [(e.step, e.value) for e in seeded.Scalars("seed 1/loss")] == [(3, 0.5)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]
    for silent in (training.Scalars(None), training.Scalars(tmp_path / "none", rank=1)):
        silent.write(1, loss=1.0)
        silent.close()
    assert not (tmp_path / "none").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ScalarsError, match="pip install tensorboard"):
        training.Scalars(tmp_path, rank=1)


# --- before a cut ---------------------------------------------------------------------------------------------------


def test_edges_with_their_reverse_are_told_from_others() -> None:
    draw = torch.Generator().manual_seed(0)
    edges = torch.randint(50, (2, 400), generator=draw)
    both = torch.cat([edges, edges.flip(0)], 1)[:, torch.randperm(800, generator=draw)]
    assert is_symmetric(both)
    assert not is_symmetric(edges)
    assert not is_symmetric(both[:, 1:] if both[0, 0] != both[1, 0] else both[:, 2:])


@pytest.mark.parametrize("algorithm", ["metis", "random"])
@pytest.mark.parametrize("num_parts", [1, 4])
def test_sizes_are_those_of_the_files(algorithm: str, num_parts: int, tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(datasets.planted(3000))
    told = forecast(graph, num_parts, algorithm)
    folder = graph.partition_graph(tmp_path, num_parts, algorithm=algorithm)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) - 2048 * num_parts  # their headers
    assert told.files * 0.99 <= size + 2048 * num_parts
    assert size <= told.files + told.halo


def test_a_dry_run_cuts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["partition", str(tmp_path / "p"), "--dataset", "karate", "--num-parts", "2", "--dry-run"]
    assert main(words) == 0
    assert "nothing was cut" in capsys.readouterr().out
    assert main([*words, "--json", str(tmp_path / "f.json")]) == 0
    told = json.loads((tmp_path / "f.json").read_text())["dry_run"]
    assert told["memory"] > 0
    assert not (tmp_path / "p").exists()
    assert main([*words, "--algorithm", "given"]) == 1


def test_short_options_balance_and_phases_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["partition", str(tmp_path), "--dataset", "karate", "--num-parts", "2", "--balance-train", "--balance-edges"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["arguments"]["node_weight"] == ["#nodes", "train_mask", "#in_edges"]
    for phase in ("check the graph", "assign nodes to parts", "write shares", "publish"):
        assert f"{phase}: " in said.err


PEAK = """
import sys, torch
from partpar import GraphData, datasets
from partpar.training import forget_peak_memory, peak_memory
graph = GraphData.from_pyg_data(datasets.planted(int(sys.argv[1])))
GraphData.from_pyg_data(datasets.planted(100)).partition_graph(sys.argv[2] + "/warm", 2, algorithm=sys.argv[3])
forget_peak_memory()
before = peak_memory()
graph.partition_graph(sys.argv[2], 4, algorithm=sys.argv[3])
print(peak_memory() - before)
"""


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["metis", "multi-constraint-metis", "ldg", "random"])
def test_memory_stays_below_the_prediction(algorithm: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, "100000", str(tmp_path), algorithm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    told = forecast(GraphData.from_pyg_data(datasets.planted(100_000)), 4, algorithm).memory
    assert 0.5 * told <= int(done.stdout) <= told


# --- as a browser draws them ----------------------------------------------------------------------------------------


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _count(pixels: np.ndarray, colour: str, near: int = 24) -> int:
    r"""How many pixels have about a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) < near).sum())


@pytest.mark.docs
def test_a_browser_draws_the_curves(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: apt-get install chromium to render the page")
    pictures = {}
    for name, log in (("full", _log(tmp_path / "run.jsonl")), ("flat", tmp_path / "flat.jsonl")):
        if name == "flat":  # one point, no phases, no traffic: what a page without curves looks like
            training.JsonLines(log).write(epoch=1, loss=1.0)
        page, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        assert main(["report", str(log), "-o", str(page)]) == 0
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1800", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [browser, *flags, f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        pictures[name] = _pixels(picture)
    blue, orange = charts.COLOURS[:2]
    # A curve over 480 pixels, two wide; bars are 20 high and up to 400 wide.
    assert _count(pictures["full"], blue) > 3000
    assert _count(pictures["full"], orange) > 1000
    assert _count(pictures["flat"], blue) < 300
    assert _count(pictures["flat"], orange) < 50
    # The DOM that the browser made of the page holds the curves, all of them.
    dumped = subprocess.run([browser, *flags, "--dump-dom", (tmp_path / "full.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert len(_Tags(dumped.stdout).of("polyline", "curve")) == 4


@pytest.mark.docs
def test_the_plot_of_a_partition_holds_its_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    folder = GraphData.from_pyg_data(datasets.karate()).partition_graph(tmp_path, 3, node_weight="train_mask")
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        drawn.append(self)
        save(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw(read_manifest(folder), tmp_path / "cut.png")
    bars, matrix = drawn[0].axes[:2]
    report = read_manifest(folder).report["nodes"]["node"]
    owned = np.array(report["owned"])
    heights = [bar.get_height() for bar in bars.containers[0]]
    assert heights == pytest.approx((owned / owned.mean()).tolist())
    assert matrix.images[0].get_array().tolist() == report["traffic"]
    pixels = _pixels(tmp_path / "cut.png")
    for container in bars.containers:
        red, green, blue, _ = container[0].get_facecolor()
        colour = "#" + "".join(f"{round(255 * c):02x}" for c in (red, green, blue))
        assert _count(pixels, colour, 12) > 2000, "bars are seen in the picture"
