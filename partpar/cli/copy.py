r"""``partpar copy``: bring each host its shares."""

from __future__ import annotations

import argparse
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from partpar.cli.delivery import Delivery, Item, Parcel, Receipt
from partpar.cli.hosts import Host, read_hosts
from partpar.cli.inspect import find_partitions
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.ssh import RemoteCommandError, Runner, Ssh
from partpar.errors import MissingPartitionError, PartitionFileError
from partpar.partition import Manifest
from partpar.partition.digest import file_digest
from partpar.partition.layout import MANIFEST

EXAMPLE = "partpar copy --hosts hosts.txt --part-root partitions/cora --workspace /data/run --with train.py"
_AT_ONCE = 16


def add_ssh_arguments(parser: argparse._ActionsContainer, required: bool = True) -> None:
    r"""Declares which hosts there are and how they are reached."""
    parser.add_argument(
        "--hosts",
        type=Path,
        required=required,
        metavar="FILE",
        help="a line for each: [USER@]ADDRESS[:SSH_PORT] [PORT or ID]",
    )
    parser.add_argument(
        "--ssh-config", type=Path, metavar="FILE", help="for ssh, instead of your own ~/.ssh/config"
    )
    parser.add_argument(
        "--connect-timeout",
        type=int,
        default=10,
        metavar="S",
        help="seconds until a silent host is given up (default: 10)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    add_ssh_arguments(parser)
    parser.add_argument(
        "--part-root",
        type=Path,
        required=True,
        metavar="DIR",
        help="a partition such as ROOT/metis_4, or ROOT if it has one",
    )
    parser.add_argument(
        "--workspace",
        required=True,
        metavar="DIR",
        help="folder at the far end, made if need be; relative to the home there",
    )
    parser.add_argument(
        "--rel-data-path",
        default="partitions",
        metavar="DIR",
        help="in the workspace, for partitions (default: partitions)",
    )
    parser.add_argument(
        "--with",
        dest="extra",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="files and folders to bring into the workspace as well, such as the training script",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another partition that stands there"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    add_json_argument(parser, "what each host was brought")


@dataclass(frozen=True)
class Consignment:
    r"""What one host is to get."""

    host: Host
    parts: range
    parcels: tuple[Parcel, ...]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for parcel in self.parcels for item in parcel.items)


def parts_of_host(number: int, num_hosts: int, num_parts: int) -> range:
    r"""The parts that a host's workers stand for, of hosts with equally many workers each.

    Rank ``r`` of ``n`` stands for part ``r // (n / num_parts)``; a part that two hosts share is brought to both.
    """
    return range(number * num_parts // num_hosts, -(-(number + 1) * num_parts // num_hosts))


def consign(
    hosts: list[Host],
    folder: Path,
    manifest: Manifest,
    data: PurePosixPath,
    workspace: PurePosixPath,
    extra: list[Item],
) -> list[Consignment]:
    r"""Shares the files of a partition out.

    Raises:
        PartitionFileError: If a file is not there or has not the size that the manifest says.
    """
    common = folder / MANIFEST
    always = [Item(common, MANIFEST, common.stat().st_size, file_digest(common))]
    whole = [record for record in (manifest.meta_file,) if record is not None]
    consignments = []
    for number, host in enumerate(hosts):
        parts = parts_of_host(number, len(hosts), manifest.num_parts)
        items = list(always)
        for record in [*whole, *(manifest.shares[part] for part in parts)]:
            path = folder / record.name
            size = path.stat().st_size if path.is_file() else None
            if size != record.num_bytes:
                found = "no file" if size is None else f"{size}"
                raise PartitionFileError(
                    f"{path}: expected {record.num_bytes} bytes, found {found}; partition again before copying"
                )
            items.append(Item(path, record.name, record.num_bytes, record.sha256))
        parcels = [Parcel(data / folder.resolve().name, tuple(items), True, MANIFEST)]
        if extra:
            parcels.append(Parcel(workspace, tuple(extra), False))
        consignments.append(Consignment(host, parts, tuple(parcels)))
    return consignments


def extra_items(paths: list[Path]) -> list[Item]:
    r"""Files to bring along, each under its own name; folders with all in them but hidden files and caches.

    Raises:
        RemoteCommandError: If one is not there, or two have one name.
    """
    items: dict[str, Item] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            named = [(p, PurePosixPath(path.resolve().name, *p.relative_to(path).parts)) for p in inside]
            found = [(p, n) for p, n in named if not any(w == "__pycache__" or w[0] == "." for w in n.parts)]
        elif path.is_file():
            found = [(path, PurePosixPath(path.name))]
        else:
            raise RemoteCommandError(f"--with {path}: expected a file or a folder, found none")
        for source, name in found:
            if str(name) in items:
                raise RemoteCommandError(
                    f"--with: expected one file {name}, found {items[str(name)].source} and {source}"
                )
            items[str(name)] = Item(source, str(name), source.stat().st_size, file_digest(source))
    return list(items.values())


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Copies to all hosts at once."""
    hosts = read_hosts(args.hosts)
    found = find_partitions(args.part_root)
    if len(found) > 1:
        raise MissingPartitionError(
            f"{args.part_root}: expected one partition, found {', '.join(f.name for f in found)}; name one of them"
        )
    ((folder, manifest),) = found.items()
    workspace = PurePosixPath(args.workspace)
    consignments = consign(
        hosts, folder, manifest, workspace / args.rel_data_path, workspace, extra_items(args.extra)
    )
    ssh, runner = Ssh(args.ssh_config, args.connect_timeout), Runner()
    use_rsync = shutil.which("rsync") is not None
    if args.dry_run:
        _print_commands(consignments, ssh, use_rsync)
        return 0

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars, ThreadPoolExecutor(_AT_ONCE) as pool:

        def carry(consignment: Consignment) -> list[Receipt]:
            bar = bars.add_task(consignment.host.label, total=consignment.num_bytes)
            receipts: list[Receipt] = []

            def tell(arrived: int) -> None:
                bars.update(bar, completed=sum(r.num_bytes for r in receipts) + arrived)

            delivery = Delivery(consignment.host, ssh, runner, use_rsync, tell)
            for parcel in consignment.parcels:
                receipts.append(delivery.deliver(parcel, args.overwrite))
            return receipts

        futures = [pool.submit(carry, consignment) for consignment in consignments]
        try:
            errors = [error for future in futures if (error := future.exception()) is not None]
        except KeyboardInterrupt:
            runner.stop()
            raise
    for error in errors:
        if not isinstance(error, (RemoteCommandError, OSError)):
            raise error
    if errors:
        raise RemoteCommandError("\npartpar: ".join(str(error) for error in errors))
    _print_receipts(console, consignments, [future.result() for future in futures], args.json)
    return 0


def _print_commands(consignments: list[Consignment], ssh: Ssh, use_rsync: bool) -> None:
    for consignment in consignments:
        delivery = Delivery(consignment.host, ssh, Runner(), use_rsync)
        for parcel in consignment.parcels:
            sends = delivery.sends(parcel, parcel.items, use_rsync)
            for words in (delivery.look(parcel), *sends, delivery.publish(parcel)):
                print(shlex.join(words))


def _print_receipts(
    console: Console, consignments: list[Consignment], receipts: list[list[Receipt]], target: str | None
) -> None:
    table = Table("host", "parts", "files", "bytes", "sent", "by", "seconds")
    records = []
    for consignment, of_host in zip(consignments, receipts, strict=True):
        label, parts = consignment.host.label, list(consignment.parts)
        records.append({"host": label, "parts": parts, "parcels": [asdict(r) for r in of_host]})
        total, sent = sum(r.num_bytes for r in of_host), sum(r.sent_bytes for r in of_host)
        by = ", ".join(dict.fromkeys(r.by for r in of_host))
        files, seconds = sum(r.num_files for r in of_host), sum(r.seconds for r in of_host)
        numbers = (str(files), f"{total:,}", f"{sent:,}")
        table.add_row(label, " ".join(map(str, parts)), *numbers, by, f"{seconds:.1f}")
    write_json(target, records)
    if tables_wanted(target):
        console.print(table)
