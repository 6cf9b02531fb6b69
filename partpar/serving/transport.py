r"""How parts ask each other: a verb, tensors and plain values go out; tensors come back.

A :class:`Transport` moves such messages and knows nothing of graphs. The verbs are those that were registered in a
:class:`Verbs`, and nothing else can be asked for.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from partpar.errors import PartparError, RemoteError, ServiceError

Tensors = dict[str, Tensor]
Values = dict[str, Any]
Handler = Callable[[Tensors, Values], Tensors]

MAX_BYTES = 1 << 30  # of a message's tensors
MAX_ITEMS = 1 << 16  # of its plain values
_MAX_TEXT = 1 << 20  # characters of its names and strings
_MAX_DEPTH = 6
_PLAIN = (bool, int, float, str, type(None))


class InFlight(ABC):
    r"""A question that was asked."""

    @abstractmethod
    def wait(self) -> Tensors:
        r"""The answer.

        Raises:
            RemoteError: The verb failed at the part that was asked; the message holds the traceback there.
            PeerLostError: That part is gone, or did not answer in time.
        """


class Done(InFlight):
    r"""An answer that is there already, or what was raised instead."""

    def __init__(self, answer: Tensors | None = None, error: Exception | None = None) -> None:
        self._answer, self._error = answer, error

    def wait(self) -> Tensors:
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer


class Verbs:
    r"""What may be asked of a part: a handler for each verb."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def register(self, verb: str, handler: Handler) -> None:
        r"""Adds a verb. Handlers are called from several threads at a time, and must not ask other parts themselves:
        if all threads of two parts waited for each other, none would be left to answer."""
        if verb in self._handlers:
            raise ServiceError(f"expected a new verb, found {verb!r}, which has a handler already")
        self._handlers[verb] = handler

    def unregister(self, verb: str) -> None:
        r"""Takes a verb out again."""
        self._handlers.pop(verb, None)

    def answer(self, verb: str, tensors: Tensors, values: Values) -> Tensors:
        r"""Checks a message and hands it to its verb's handler."""
        handler = self._handlers.get(verb) if isinstance(verb, str) else None
        if handler is None:
            raise ServiceError(f"expected a verb of {sorted(self._handlers)}, found {verb!r}")
        check_message(tensors, values)
        try:
            return handler(tensors, values)
        except PartparError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            # Such as for a name that is absent.
            raise ServiceError(f"{verb!r} failed on what it was asked: {type(error).__name__}: {error}") from error


class Transport(ABC):
    r"""Carries questions from this part to all parts."""

    @abstractmethod
    def begin(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> InFlight:
        r"""Asks a part.

        Args:
            part: Which part.
            verb: What is asked for.
            tensors: Dense CPU tensors, at most :data:`MAX_BYTES` in total.
            values: Numbers, strings, :obj:`None`, and lists and dictionaries of these.
        """

    def begin_all(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> list[InFlight]:
        r"""Asks every process that stands for a part."""
        return [self.begin(part, verb, tensors, values)]

    def name(self, part: int) -> str:
        r"""Who is asked, for messages."""
        return f"part {part}"

    def abandon(self) -> None:  # noqa: B027 - most wait for nobody
        r"""Has :meth:`close` wait for nobody: something failed here."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        r"""Ends it, in bounded time."""


class InProcessTransport(Transport):
    r"""All parts in this process: for one part alone, and for tests."""

    def __init__(self, parts: Mapping[int, Verbs]) -> None:
        self.parts = parts

    def begin(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> InFlight:
        try:
            return Done(self.parts[part].answer(verb, dict(tensors), dict(values or {})))
        except Exception:  # noqa: BLE001 - it is raised where the answer is awaited
            return Done(error=failure(self.name(part), verb, traceback.format_exc()))


def failure(who: str, verb: str, trace: str) -> RemoteError:
    r"""What the asking side raises for a verb that failed elsewhere."""
    cause = trace.strip().splitlines()[-1] if trace.strip() else "no reason given"
    return RemoteError(f"{who} failed in {verb!r}: {cause}\n\nThe traceback there:\n{trace}")


def below(tensors: Mapping[str, Tensor], key: object) -> Tensors:
    r"""The tensors of one of several parts of a message: those called ``"key/name"``, by name."""
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{key}/")}


def check_message(tensors: Tensors, values: Values) -> None:
    r"""Raises :class:`~partpar.errors.ServiceError` for what is no message: it may come from a stranger."""
    if not isinstance(tensors, dict) or not isinstance(values, dict) or len(tensors) > MAX_ITEMS:
        raise ServiceError("expected tensors and values by name, found something else")
    size = 0
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ServiceError(f"{name!r}: expected a dense CPU tensor, found {type(tensor).__name__}")
        size += tensor.nbytes
    if size > MAX_BYTES:
        raise ServiceError(f"expected tensors of at most {MAX_BYTES} bytes in a message, found {size}")
    _check_plain([list(tensors), values])


def _check_plain(message: Any) -> None:
    """Counts before it looks at what it counts: lists may hold each other, many times over."""
    items, text, left = 1, 0, [(message, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, str):
            text += len(value)
        elif isinstance(value, (list, tuple, Mapping)):
            items += len(value) * (2 if isinstance(value, Mapping) else 1)
            if depth > _MAX_DEPTH or items > MAX_ITEMS:
                raise ServiceError(f"expected at most {MAX_ITEMS} values nested {_MAX_DEPTH} deep, found more")
            inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            left += [(one, depth + 1) for one in inner]
        elif not isinstance(value, _PLAIN) or (isinstance(value, int) and value.bit_length() > 64):
            raise ServiceError(f"expected plain values, and integers of 64 bits, found {type(value).__name__}")
    if text > _MAX_TEXT:
        raise ServiceError(f"expected at most {_MAX_TEXT} characters in a message, found {text}")
