r"""A process of its own that answers for a share, so that trainers in pure Python do not keep others waiting.

There is one for each part: the first worker of the part starts it, and it ends with that worker. Trainers go on reading
their own part's rows from the mapped file, whose pages they share with it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from partpar.errors import ServiceError
from partpar.serving import agent
from partpar.serving.cache import RowCache
from partpar.serving.owner import Owner
from partpar.serving.partition import open_part
from partpar.serving.remote import RpcTransport
from partpar.serving.service import Service

_END = 10.0  # seconds that it gets to end by itself
_LAST_WORD = b"end\n"


def server_name(part: int) -> str:
    r"""What the server of a part is called."""
    return f"server-{part}"


class ServerProcess:
    r"""The process, seen by the worker that started it.

    Args:
        folder: Of the partition.
        part: Whose share.
        endpoint: The name of the service.
        workers: For each part, who stands for it; the servers first.
        rank: Of the server among all processes.
        world_size: Number of these.
        token: Tells apart what else is kept in the store.
        timeout: Seconds until a part that does not answer counts as lost.
        num_threads: How many questions are answered at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        part: int,
        endpoint: str,
        workers: list[list[str]],
        rank: int,
        world_size: int,
        token: str,
        timeout: float,
        num_threads: int,
    ) -> None:
        store = agent.shared_store()
        task = {"folder": str(folder), "part": part, "endpoint": endpoint, "workers": workers, "rank": rank}
        task |= {"world_size": world_size, "token": token, "timeout": timeout, "num_threads": num_threads}
        task |= {"host": store.host, "port": store.port}
        # Its input stays open as long as this process lives and does not close it; that is how it knows.
        self._process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE)  # noqa: S603
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ServiceError(f"the server of part {part} ended with code {self._process.wait()} at its start") from error

    def say_end(self) -> None:
        r"""Tells it that nobody asks any more, so that it ends together with the workers."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(_LAST_WORD)
            self._process.stdin.flush()

    def close(self) -> None:
        r"""Ends it, in bounded time."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    r"""Answers until the input ends."""
    task: dict[str, Any] = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    share = open_part(task["folder"], task["part"])
    store = dist.TCPStore(task["host"], task["port"], is_master=False)
    transport = RpcTransport(task["endpoint"], task["workers"], task["timeout"])
    owner = Owner(share, RowCache(share, 0))
    Service(owner, transport, task["timeout"])  # which adds what is made of other parts' answers
    agent.offer(task["endpoint"], owner.verbs)
    agent.start(
        server_name(task["part"]),
        task["rank"],
        task["world_size"],
        dist.PrefixStore(task["token"], store),
        task["timeout"],
        task["num_threads"],
    )
    agent.say_farewell(task["endpoint"])  # it never asks on its own account
    agent.stop(_END / 2, wait=sys.stdin.read(len(_LAST_WORD)) == _LAST_WORD.decode())


if __name__ == "__main__":
    main()
