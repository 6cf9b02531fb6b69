r"""Waiting for all processes that start their agents: in bounded time, and with an ear for Ctrl-C.

torch awaits them in compiled code, which hears no signal, and for 24 days: a process that ended on its way there would be
awaited by all others for as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from partpar.errors import PeerLostError

_LOOK = 0.5  # seconds after which to look whether they still run
_PAUSE = 0.02


def await_all(
    store: dist.Store, name: str, rank: int, world_size: int, timeout: float, fate: Callable[[int, bool], str | None]
) -> None:
    r"""Returns once all processes have come here (collective).

    Args:
        store: One that all of them share, for this start alone.
        name: This process's name, for messages.
        rank: Its number.
        world_size: How many processes take part.
        timeout: Seconds that they may take.
        fate: What is known to have befallen one, by its number and whether to count one that is stopped; :obj:`None` where
            nothing is.

    Raises:
        PeerLostError: One is gone, or did not come in time; the message names it.
    """
    begin, missing = time.monotonic(), list(range(world_size))
    look = _LOOK
    try:
        store.set(f"came_{rank}", "1")
        # A wait of the store's own is deaf to Ctrl-C, and warns when its time is up.
        while missing := [other for other in missing if not store.check([f"came_{other}"])]:
            waited = time.monotonic() - begin
            late = waited >= timeout
            if late or waited >= look:
                look = waited + _LOOK
                told = {other: fate(other, late) or (f"rank {other} did not come" if late else None) for other in missing}
                if any(told.values()):
                    raise PeerLostError(
                        f"{name} awaited {world_size} processes in the start of their remote service for {waited:.1f} s: "
                        f"{'; '.join(said for said in told.values() if said)}"
                    )
            time.sleep(_PAUSE)
    except dist.DistNetworkError as error:
        raise PeerLostError(
            f"{name} awaited {world_size} processes in the start of their remote service: the process that keeps their "
            f"store is gone ({error})"
        ) from error


@contextlib.contextmanager
def bounded(timeout: float) -> Iterator[None]:
    r"""Within this context, torch's start awaits others for so many seconds: one may end after all have come."""
    from torch.distributed.rpc import constants

    kept = constants.DEFAULT_PROCESS_GROUP_TIMEOUT
    constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=timeout)
    try:
        yield
    finally:
        constants.DEFAULT_PROCESS_GROUP_TIMEOUT = kept
