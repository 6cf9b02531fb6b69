r"""Ranks of a benchmark as fresh processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    r"""A TCP port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(script: str, case: dict[str, Any], num_ranks: int, threads: int) -> list[dict[str, Any]]:
    r"""Runs a script of this folder as so many ranks; returns what each wrote. With huge pages, unless the case says
    that it is not ``tuned``."""
    with tempfile.TemporaryDirectory() as results:
        shared = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        if case.get("tuned", True):  # as `partpar` sets it for workers that it starts; torch reads it once
            shared["THP_MEM_ALLOC_ENABLE"] = "1"
        command = [sys.executable, str(HERE / script), json.dumps(case | {"results": results})]
        port = str(free_port())
        ranks = []
        for rank in range(num_ranks):
            launched = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": port}
            ranks.append(subprocess.Popen(command, env=shared if num_ranks == 1 else shared | launched))
        if any(list(map(subprocess.Popen.wait, ranks))):
            raise RuntimeError(f"{script}: a process failed, see above; the case was {case}")
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(num_ranks)]
