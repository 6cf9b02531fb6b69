r"""What reads bytes of strangers, fed with bytes that coverage leads to: ``python fuzz.py TARGET SECONDS [MUTANT]``, in
an empty folder.

Only errors of ours may come out, in bounded time and memory, and what was accepted must be harmless. atheris (libFuzzer)
looks for inputs from the seeds beside this file; an input of JSON is mostly changed as a tree, so that changes come deep.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from parts import serve, shares_of, typed_graph

from partpar.cli import hosts as hosts_module
from partpar.errors import PartparError, ServiceError
from partpar.partition import load, manifest
from partpar.partition.manifest import FileRecord, Manifest
from partpar.sampling import relay, wire
from partpar.serving import hop, messages, owner, protocol, raw_ids, service, transport
from partpar.serving.messages import HopReply, HopRequest

SEEDS = Path(__file__).with_name("seeds")
MEMORY = 256  # MiB that a process may take beyond what it has when it begins
ANSWER = 1 << 20  # bytes: what one answer may hold here, where no input is longer than LENGTH
LENGTH = 4096
SECONDS = 10  # that one input may take
KINDS = {"F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "BOOL": "bool", "U8": "uint8", "C64": "complex64"}
RUN_ID = "0"


class Targets:
    r"""A method for each kind of input; each raises for what must not be.

    Args:
        folder: To write files into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._service: service.Service | None = None

    def run(self, name: str, data: bytes) -> bool:
        r"""Whether an input was accepted; refusing it by an error of ours is as well."""
        try:
            getattr(self, name)(data)
        except PartparError as error:
            if "allocate" in str(error.__cause__):  # torch's lack of memory, as the service tells of it
                raise MemoryError from error
            return False
        return True

    def manifest(self, data: bytes) -> None:
        r"""A manifest names files in its own folder, and is the same when it is written and read again."""
        path = self.folder / "manifest.json"
        path.write_bytes(data)
        found = manifest.read_manifest(self.folder)
        for record in [*found.shares, *([found.meta_file] if found.meta_file else [])]:
            place = Path(os.path.normpath(self.folder / record.name))
            assert place.parent == self.folder and str(place).isprintable(), record.name
            assert not place.exists() or place in (path, self.folder / "000.safetensors"), record.name
        path.write_text(found.to_json())
        assert manifest.read_manifest(self.folder).to_json() == found.to_json()

    def share(self, data: bytes) -> None:
        r"""A share that was forged together with its manifest, which says what the share's header says."""
        path = self.folder / "000.safetensors"
        path.write_bytes(data)
        record = FileRecord(path.name, len(data), "0", _told(data))
        offsets, edges = {"n": [0, 3, 5]}, [(("n", "to", "n"), [0, 4, 9])]
        opened = load.open_share(self.folder, Manifest(RUN_ID, 2, "metis", {}, offsets, edges, [record, record]), 0, verify=False)  # type: ignore[arg-type]
        for frame in (opened.node(), opened.node(side="src"), opened.edge()):
            for name in frame:
                assert frame[name].size(0) == frame.num_rows
        indptr, indices = opened.csc()
        assert indptr[0] == 0 and all(a <= b for a, b in pairwise(indptr.tolist())) and indptr[-1] == indices.numel() == 4
        assert 0 <= indices.min() <= indices.max() < opened.node(side="src").num_rows

    def hosts(self, data: bytes) -> None:
        r"""Words for ssh hold nothing that a shell or ssh itself would take for more than a word."""
        accepted, refused = 0, None
        for suffix in (".txt", ".yaml"):
            path = self.folder / f"hosts{suffix}"
            path.write_bytes(data)
            try:
                found = hosts_module.read_hosts(path)
            except PartparError as error:
                refused = error
                continue
            accepted += 1
            for host in found:
                for word in (host.target, host.bracketed, host.interface or "eth0"):
                    assert re.fullmatch(r"\[?[A-Za-z0-9_:][A-Za-z0-9_.:%@-]*\]?", word), host
                assert all(port is None or 0 < port < 65536 for port in (host.port, host.ssh_port)), host
        if not accepted and refused is not None:
            raise refused

    def call(self, data: bytes) -> None:
        r"""A question, or an answer, as it comes out of torch's own layer; written down as JSON."""
        try:
            raw = json.loads(data)
            verb, tensors, values = raw["verb"], {k: _tensor(t) for k, t in raw["tensors"].items()}, raw["values"]
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError):
            return  # not written down well
        if verb in ("request", "reply"):
            transport.check_message(tensors, values)
            read = (HopRequest if verb == "request" else HopReply).from_wire(tensors, values)
            if isinstance(read, HopReply):
                rows = torch.arange(read.counts.numel())
                HopReply.merge([read, read], [rows, rows + rows.numel()], 2 * rows.numel())
            return
        answer = self.parts.owner.verbs.answer(verb, tensors, values)
        assert sum(tensor.nbytes for tensor in answer.values()) <= ANSWER

    def relay(self, data: bytes) -> None:
        r"""A question of a process that makes batches, as it comes through its socket: frames, written down as JSON. One is
        a tree that is written as JSON itself, text that is written as it is, or a number of zeros, of which not all may come."""
        try:
            frames = json.loads(data)["frames"]
            stream = b"".join(_frame(frame) for frame in frames)
        except (LookupError, ValueError, TypeError, RecursionError, struct.error):
            return  # not written down well
        ours, theirs = socket.socketpair()
        with ours, connection.Connection(theirs.detach()) as line:
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                ours.sendall(stream)
            ours.shutdown(socket.SHUT_WR)
            try:
                tensors, values = wire.receive(line)
            except (EOFError, OSError) as error:
                raise ServiceError("it ended before all had come") from error
        answer = relay.Questions(self.parts).answer(tensors, values)
        assert sum(tensor.nbytes for tensor in answer.values()) <= ANSWER

    @property
    def parts(self) -> service.Service:
        r"""Of a typed graph in two parts."""
        if self._service is None:
            self._service = serve(shares_of(typed_graph(), 2, self.folder / "parts"))
        return self._service


def _frame(frame: Any) -> bytes:
    r"""What goes over the line for a frame: its length, and as much of it as there is."""
    if isinstance(frame, int):
        return struct.pack("!i", frame) + bytes(min(max(frame, 0), 1 << 16))
    body = frame.encode("latin-1") if isinstance(frame, str) else json.dumps(frame).encode()
    return struct.pack("!i", len(body)) + body


def _told(share: bytes) -> dict[str, list[Any]]:
    r"""What the header of a share says of its tensors."""
    told = {}
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        for name, facts in json.loads(share[8 : 8 + int.from_bytes(share[:8], "little")]).items():
            with contextlib.suppress(KeyError, TypeError):
                told[name] = [KINDS[facts["dtype"]], facts["shape"]]
    return told


def _tensor(raw: Any) -> Any:
    r"""``[dtype, shape, values]``, repeated to the shape; anything else stands for itself."""
    if not (isinstance(raw, list) and len(raw) == 3):
        return raw
    dtype, shape, values = raw
    flat = torch.tensor(values).to(vars(torch)[dtype] if dtype in KINDS.values() else torch.int64)
    if dtype == "meta" or len(shape) > 3 or any(not 0 <= n <= 1 << 40 for n in shape):
        return flat.to("meta")
    if dtype == "sparse":
        return flat.to_sparse()
    # One value takes no room, however large the shape.
    return flat.expand(shape) if flat.numel() == 1 else flat[:: shape[0] or 1] if dtype == "strided" else flat.reshape(shape)


# --- changing an input ------------------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1, 2, 7, 10**7, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**300, 0.5, -1e300, float("inf"), float("nan"),
       "", ".", "..", "/", "a/b", "\0", "\ud800", "é", "x" * 300, "F4", "C64", "F32", "I32", "BOOL", "onnx", "sparse", "meta", "strided",
       "uniform", "last", "time", "weight", "ids", "raw_ids", "x", [], {}, [[]], [0], [1, 2], [None], {"a": 0}, [2**40], [3, 0]]  # fmt: skip
WORDS = [b"hosts:\n", b"- ", b"address: ", b"user: ", b"ssh_port: ", b"port: ", b"id: ", b"interface: ", b"10.0.0.1", b"[::1%eth0]:22", b"@", b"%",
         b"-oProxyCommand=x", b"$(x)", b" 22", b" 0\n", b" 1\n", b"\n", b"#", b'"\\UFFFFFFFF"', b"%YAML 1.1\n---\n", b"!!int ", b"!<%FF>", b"&a ",
         b"*a", b"? ", b": ", b"[", b"]", b"{", b"}", b"|\n", b"\xe2\x80\xa8", b"\xd9\xa1", b"~", b"'"]  # fmt: skip


def change(data: bytes, most: int, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    r"""Another input.

    Args:
        data: This one.
        most: Bytes.
        seed: Of what is drawn.
        mutate: Changes bytes as bytes.
    """
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return mutate(data, most)
    start = 8 if data[8:9] == b"{" else 0
    end = start + int.from_bytes(data[:8], "little") if start else len(data)
    try:
        tree = [json.loads(data[start:end])]
        for _ in range(draw.choice((1, 1, 2, 3))):
            _edit(tree, draw)
        text = json.dumps(tree[0] if tree else None).encode()
    except (ValueError, RecursionError):
        at = draw.randrange(len(data) + 1)
        return (data[:at] + draw.choice(WORDS) + data[at + draw.choice((0, 0, 1, 5)) :])[:most]
    return ((len(text).to_bytes(8, "little") if start else b"") + text + data[end:])[:most]


def _edit(tree: list[Any], draw: random.Random) -> None:
    r"""Changes one place of a tree."""
    places = list(_places(tree))
    if not places:
        return
    inside, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside[key], int):
        inside[key] += draw.choice((-1, 1, 1 << 20))
    elif kind == 2:
        other, its_key = draw.choice(places)
        inside[key] = json.loads(json.dumps(other[its_key]))
    elif kind == 3 and isinstance(inside, dict):
        inside[draw.choice([key + "x", "..", "", *(str(k) for _, k in places)])] = inside.pop(key)
    elif kind == 4:
        inside[key] = [inside[key]] * draw.choice((1, 2, 60))
    else:
        inside[key] = json.loads(json.dumps(draw.choice(ODD)))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


# --- mistakes that must be found ---------------------------------------------------------------------------------------


def take_any_file_name() -> None:
    manifest._FILE = re.compile(".*", re.DOTALL)


def look_at_no_indices() -> None:
    load._within = lambda *_: True  # type: ignore[assignment]


def take_any_address() -> None:
    hosts_module._check_address = lambda *_: None  # type: ignore[assignment]


def answer_without_bound() -> None:
    owner.MAX_BYTES = 1 << 60


def take_any_shape() -> None:
    wire._column = lambda name, dtype, shape: (name, getattr(torch, dtype), shape)  # type: ignore[assignment]


MUTANTS: dict[str, tuple[str, Callable[[], None]]] = {
    "take_any_file_name": ("manifest", take_any_file_name),
    "look_at_no_indices": ("share", look_at_no_indices),
    "take_any_address": ("hosts", take_any_address),
    "answer_without_bound": ("call", answer_without_bound),
    "take_any_shape": ("relay", take_any_shape),
}
TARGETS = ("manifest", "share", "hosts", "call", "relay")

# --- a process of its own ----------------------------------------------------------------------------------------------


def functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    r"""What a module defines; compiled loops are none of these."""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) == module.__name__:
            members = vars(thing).values() if isinstance(thing, type) else [thing]
            yield from (f for f in (getattr(m, "__func__", m) for m in members) if isinstance(f, types.FunctionType))


def bound_memory() -> int:
    r"""Lets this process have :data:`MEMORY` more than now; returns the MiB that it may have resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    data = (int(status["VmData"].split()[0]) >> 10) + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (data << 20, resource.RLIM_INFINITY))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) + MEMORY


def main(target: str, seconds: str, mutant: str | None = None) -> None:
    r"""Fuzzes one target for some seconds; the process ends with a code when something comes through."""
    import atheris

    torch.set_num_threads(1)
    for module in (manifest, load, hosts_module, messages, transport, owner, hop, protocol, raw_ids, service, wire, relay):
        for function in functions(module):
            atheris.instrument_func(function)
    owner.MAX_BYTES = transport.MAX_BYTES = ANSWER
    targets = Targets(Path.cwd())
    good = [path for path in sorted((SEEDS / target).iterdir()) if targets.run(target, path.read_bytes())]
    assert good, "a good seed must be read"
    found = Path("found")
    found.mkdir()
    corpus = [str(found), str(SEEDS / target)]
    if mutant is not None:  # which seeds that once brought out a mistake would find at once
        corpus = corpus[:1]
        for path in good:
            shutil.copy(path, found)
        MUTANTS[mutant][1]()
    options = [f"-max_total_time={float(seconds):.0f}", f"-max_len={LENGTH}", f"-timeout={SECONDS}", f"-rss_limit_mb={bound_memory()}"]

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        return change(data, most, seed, atheris.Mutate)

    def look(data: bytes) -> None:
        try:
            targets.run(target, data)
        except BaseException:  # noqa: BLE001 - told at once: at an exit in order, libFuzzer's alarm may end it unheard
            Path("crash-found").write_bytes(data)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(77)

    atheris.Setup([sys.argv[0], *options, "-seed=1", *corpus], look, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
