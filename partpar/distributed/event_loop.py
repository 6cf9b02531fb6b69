r"""Under the name of the module that the original has it in."""

from partpar.sampling.event_loop import ConcurrentEventLoop, to_asyncio_future

__all__ = ["ConcurrentEventLoop", "to_asyncio_future"]
