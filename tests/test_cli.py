r"""The command line: what it prints, draws, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData

from partpar import GraphData, datasets
from partpar.cli import demo, quality, workers
from partpar.cli.main import COMMANDS, main
from partpar.errors import GraphError


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that rich breaks no line


def _partition(root: Path, *more: str) -> int:
    return main(["partition", str(root), "--dataset", "karate", "--num-parts", "2", *more])


def test_partition_prints_the_report_and_inspect_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _partition(tmp_path, "--balance", "train_mask") == 0
    printed = capsys.readouterr().out
    assert "2 part(s) by metis" in printed
    share = GraphData.load_partition(tmp_path, 1, 2)
    rows = [line for line in printed.splitlines() if line.startswith("│ 1 ")]
    assert str(share.num_owned()) in rows[0]
    assert "largest / mean, train_mask" in printed

    assert main(["inspect", str(tmp_path / "metis_2")]) == 0
    assert capsys.readouterr().out == printed


def test_inspect_prints_json_of_every_partition_in_a_root(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _partition(tmp_path) == 0
    assert _partition(tmp_path, "--algorithm", "lgd", "--option", "passes=3", "--seed", "4") == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["algorithm"], one["num_parts"]) for one in found] == [("ldg", 2), ("metis", 2)]
    assert found[0]["arguments"]["options"] == {"passes": 3, "seed": 4}
    assert found[1]["report"]["num_nodes"] == 34


def test_the_report_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    assert _partition(tmp_path, "--plot", str(tmp_path / "cut.png")) == 0
    assert (tmp_path / "cut.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(tmp_path / "metis_2"), "--plot", str(tmp_path / "cut.svg"), "--json"]) == 0
    drawing = (tmp_path / "cut.svg").read_text()
    assert "<svg" in drawing
    assert main(["inspect", str(tmp_path / "metis_2"), "--plot", str(tmp_path / "cut.nosuch")]) == 1
    assert "expected the name of a picture" in capsys.readouterr().err


def test_without_matplotlib_drawing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert _partition(tmp_path, "--plot", str(tmp_path / "cut.png")) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "metis_2").exists(), "nothing was cut for a picture that cannot be drawn"


def test_all_inputs_give_the_same_partition(tmp_path: Path) -> None:
    data = datasets.karate()
    torch.save(data, tmp_path / "g.pt")
    np.savez(tmp_path / "g.npz", **{name: value.numpy() for name, value in data})
    GraphData.from_pyg_data(data).save(tmp_path / "folder")
    run_ids = set()
    for number, source in enumerate((["--pt", "g.pt"], ["--npz", "g.npz"], ["--folder", "folder"])):
        words = [str(tmp_path / str(number)), source[0], str(tmp_path / source[1]), "--num-parts", "3"]
        assert main(["partition", *words]) == 0
        run_ids.add(json.loads((tmp_path / str(number) / "metis_3" / "manifest.json").read_text())["run_id"])
    assert len(run_ids) == 1


def test_typed_graphs_are_reported_by_type(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = HeteroData()
    data["a"].x, data["b"].x = torch.ones(6, 2), torch.ones(4, 3)
    data["a", "to", "b"].edge_index = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 3]])
    torch.save(data, tmp_path / "h.pt")
    assert main(["partition", str(tmp_path), "--pt", str(tmp_path / "h.pt"), "--num-parts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "exchange of a, features x" in printed
    assert "exchange of b, features x" in printed


class _Sly:
    def __reduce__(self) -> tuple:
        return (print, ("run by a file",))


def test_a_pt_file_runs_no_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(Data(x=torch.ones(2), more=_Sly()), tmp_path / "sly.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "no.pt").write_bytes(b"nothing of the kind")
    (tmp_path / "program.pt").write_text('r"""A program."""\nimport torch\n')
    for name, message in (
        ("sly", "something else"),
        ("list", "found a list"),
        ("no", "something else"),
        ("program", "something else"),
        ("gone", "none"),
    ):
        with pytest.raises(GraphError, match=rf"{name}\.pt: expected .*{message}"):
            datasets.load(str(tmp_path / f"{name}.pt"))
    assert "run by a file" not in capsys.readouterr().out
    for name in ("sly", "no"):
        with pytest.raises(GraphError) as error:
            datasets.load(str(tmp_path / f"{name}.pt"))
        assert "weights_only" not in str(error.value), "torch's advice to run the file's code is not handed on"
    np.savez(tmp_path / "mine.npz", edge_index=np.zeros((2, 1), dtype=np.int64))
    with pytest.raises(GraphError, match="found arrays of numpy; read an .npz file by from_npz .--npz on"):
        datasets.from_pt(tmp_path / "mine.npz")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "{tmp}"], "expected a partition or a folder of some, found no manifest.json"),
        (["partition", "{tmp}", "--npz", "{tmp}/no.npz", "--num-parts", "2"], "none there"),
        (["partition", "{tmp}", "--dataset", "nonesuch", "--num-parts", "2"], "expected a dataset among"),
        (["partition", "{tmp}", "--dataset", "karate", "--num-parts", "0"], "num_parts"),
        (["partition", "{tmp}", "--dataset", "karate", "--num-parts", "2", "--algorithm", "best"], "best"),
        (
            ["partition", "{tmp}", "--dataset", "karate", "--num-parts", "2", "--option", "x"],
            "--option NAME=VALUE",
        ),
        (["partition", "{tmp}", "--dataset", "karate", "--num-parts", "2", "--balance", "mass"], "mass"),
    ],
)
def test_failures_exit_with_1_and_say_why(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([word.format(tmp=tmp_path) for word in words]) == 1
    said = capsys.readouterr()
    told = said.err.splitlines()[-1]  # phases of the cut stand above
    assert told.startswith("partpar: ")
    assert message in told


def test_an_existing_partition_is_replaced_only_if_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _partition(tmp_path) == 0
    assert "already there" not in capsys.readouterr().err
    assert _partition(tmp_path) == 0, "the very same one is no conflict"
    assert f"partpar: already there, kept: {tmp_path / 'metis_2'}\n" in capsys.readouterr().err
    assert _partition(tmp_path, "--seed", "9") == 1
    assert "overwrite" in capsys.readouterr().err
    assert _partition(tmp_path, "--seed", "9", "--overwrite") == 0


def test_more_parts_than_nodes_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["partition", str(tmp_path), "--dataset", "karate", "--algorithm", "random", "--num-parts"]
    assert main([*words, "36", "--dry-run"]) == 0
    assert "36 parts of 34 nodes: at least 2 will be empty" in capsys.readouterr().err
    assert main([*words, "34", "--dry-run"]) == 0
    assert "empty" not in capsys.readouterr().err


def test_several_partitions_are_not_drawn_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _partition(tmp_path) == 0
    assert _partition(tmp_path, "--algorithm", "random") == 0
    assert main(["inspect", str(tmp_path), "--plot", str(tmp_path / "cut.png")]) == 1
    assert "found metis_2, random_2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fly"], ["partition", "x"], ["inspect"]])
def test_a_wrong_command_line_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2


def test_without_a_command_the_list_of_commands_is_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr()
    assert said.out == ""
    assert all(f"\n    {command}" in said.err for command in COMMANDS)
    assert said.err.endswith("partpar: expected a command, found none\n")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"partpar {version('partpar')}\n"


def test_the_list_of_commands_and_the_demo_spare_torch() -> None:
    script = "import sys; from partpar.cli.main import make_parser; make_parser('demo').format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    said = capsys.readouterr().out
    assert f"example: partpar {command}" in said
    assert "exit codes: 0 done, 1 failed" in said


def test_sizes_are_written_for_people() -> None:
    assert [quality.size_text(n) for n in (0, 1023, 1024, 3 << 20, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]


@pytest.mark.soak
def test_the_demo_reaches_the_same_loss(capfd: pytest.CaptureFixture) -> None:
    assert main(["demo", "--nodes", "300", "--epochs", "10", "--timeout", "120", "--json"]) == 0
    said = capfd.readouterr()
    assert "the same loss in every epoch" in said.err
    assert "2 worker(s)" in said.err
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [record["epoch"] for record in found] == [*range(1, 11)]
    assert all(set(record["loss"]) == {"1", "2"} for record in found)
    assert max(record["difference"] for record in found) < 1e-9


def test_the_demo_fails_when_losses_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def pretend(module: str, number: int, words: list[str], timeout: float, stdout: int | None) -> None:
        lines = [json.dumps({"epoch": epoch, "loss": 1.0 + 1e-6 * number * epoch}) for epoch in (1, 2, 3)]
        Path(words[0], f"{number}.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(demo, "run_workers", pretend)
    assert main(["demo", "--epochs", "3"]) == 1
    said = capsys.readouterr().out
    assert "the losses differ by up to 3.0e-06" in said
    assert "1 worker(s)" in said, "without --json all is on standard output"
    assert "no benchmark" in said and "docs/performance.rst" in said


@pytest.mark.parametrize("threads", [None, "1", "3"])
def test_workers_keep_the_threads_that_the_user_named(threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    class Ended:
        def __init__(self, command: list[str], env: dict[str, str], **more: object) -> None:
            seen.update(env)

        def wait(self, timeout: float) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.delenv("OMP_NUM_THREADS") if threads is None else monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(subprocess, "Popen", Ended)
    workers.run_workers("program", 2, [], 1.0)
    assert seen["OMP_NUM_THREADS"] == (threads or "1")
    assert (seen.get("PARTPAR_KEEP_THREADS") == "1") == (threads is not None)


@pytest.mark.faults
def test_workers_that_fail_or_linger_are_reported_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "lingers.py").write_text(
        "import os, sys, time; open(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close(); time.sleep(600)"
    )
    with pytest.raises(workers.WorkerError, match=r"1 worker\(s\) of fails failed with exit code 1"):
        workers.run_workers("fails", 1, [], 60)
    with pytest.raises(workers.WorkerError, match=r"2 worker\(s\) of lingers were not done in 25 s"):
        workers.run_workers("lingers", 2, [str(tmp_path)], 25)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids:
        assert (
            not Path(f"/proc/{pid}/cmdline").exists()
            or b"lingers" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    with pytest.raises(workers.WorkerError, match="expected at least 1 worker, found 0"):
        workers.run_workers("fails", 0, [], 1)


@pytest.mark.soak
def test_the_module_is_a_program() -> None:
    command = [sys.executable, "-m", "partpar.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "partition" in done.stdout
