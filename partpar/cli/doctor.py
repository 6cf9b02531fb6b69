r"""``partpar doctor``: whether this machine, or all hosts, can train."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from partpar.cli import checks
from partpar.cli.checks import FAIL, OK, WARN, Check
from partpar.cli.copy import add_ssh_arguments, parts_of_host
from partpar.cli.hosts import Host, read_hosts
from partpar.cli.inspect import find_partitions
from partpar.cli.launch import Job, add_far_arguments, check_job, run_job
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.ping import RPC
from partpar.cli.ssh import RemoteCommandError, Runner, Ssh, checked
from partpar.errors import MissingPartitionError
from partpar.partition import Manifest

EXAMPLE = "partpar doctor --part-root partitions/cora"
_SAME = ("partpar", "torch", "torch_geometric")  # versions that hosts must share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument(
        "--part-root",
        type=Path,
        metavar="DIR",
        help="check that the shares of this partition fit into memory",
    )
    add_json_argument(parser, "the checks")
    parser.add_argument("--no-ping", action="store_true", help="start no ranks")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds for each ping (default: 120)"
    )
    far = parser.add_argument_group(
        "several hosts: each is checked, then ranks on all of them ping each other"
    )
    add_ssh_arguments(far, required=False)
    far.add_argument(
        "--workspace",
        default=".",
        metavar="DIR",
        help="folder at the far end to start in (default: the home)",
    )
    add_far_arguments(far)


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Prints what was found; 1 if anything failed."""
    manifest = None if args.part_root is None else _one_manifest(args.part_root)
    if args.hosts is None:
        found = checks.all_checks(manifest, None if args.no_ping else args.timeout)
    else:
        found = _of_hosts(args, manifest)
    write_json(args.json, [asdict(check) for check in found])
    if tables_wanted(args.json):
        console.print(_table(found, several=args.hosts is not None))
    return 1 if any(check.state == FAIL for check in found) else 0


def _one_manifest(folder: Path) -> Manifest:
    found = find_partitions(folder)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise MissingPartitionError(f"{folder}: expected one partition, found {names}; name one of them")
    return next(iter(found.values()))


def _of_hosts(args: argparse.Namespace, manifest: Manifest | None) -> list[Check]:
    hosts = read_hosts(args.hosts)
    ssh, runner = Ssh(args.ssh_config, args.connect_timeout), Runner()
    job = Job.of(args, ["-m", "partpar.cli.ping"])
    with ThreadPoolExecutor(len(hosts)) as pool:
        try:
            each = list(pool.map(lambda host: _of_host(host, job, ssh, runner), hosts))
        except KeyboardInterrupt:
            runner.stop()
            raise
    found = [check for of_host in each for check in of_host]
    if manifest is not None:
        # The far ends need not have the partition yet.
        for number, (host, of_host) in enumerate(zip(hosts, each, strict=True)):
            found += _memory(host, of_host, manifest, parts_of_host(number, len(hosts), manifest.num_parts))
    found += [_agreement(name, found) for name in _SAME]
    if not args.no_ping and all(check.state != FAIL for check in found):
        found += [_ping(name, hosts, job, ssh, args) for name in ("gloo", RPC)]
    return found


def _of_host(host: Host, job: Job, ssh: Ssh, runner: Runner) -> list[Check]:
    words = job.shell([job.python, "-m", "partpar.cli.main", "doctor", "--json", "--no-ping"])
    try:
        # Code 1 stands for checks that failed, which it has printed.
        code, out, err = runner.run(ssh.command(host, words))
        lines = checked(host, (0 if code == 1 and out else code, out, err), "partpar doctor").splitlines()
        return [replace(Check(**json.loads(line)), host=host.label) for line in lines if line.startswith("{")]
    except RemoteCommandError as error:
        remedy = "mend it, or name Python by --python and --prelude"
        return [Check("partpar there", FAIL, str(error), remedy, host.label)]


def _memory(host: Host, of_host: list[Check], manifest: Manifest, parts: range) -> list[Check]:
    free = next((int(check.found.split()[0]) << 20 for check in of_host if check.name == "free memory"), None)
    return [] if free is None else [replace(checks.memory(manifest, parts, free), host=host.label)]


def _agreement(name: str, found: list[Check]) -> Check:
    versions = {check.host: check.found for check in found if check.name == name}
    if len(set(versions.values())) > 1:
        text = ", ".join(f"{host} {version}" for host, version in versions.items())
        return Check(f"same {name}", FAIL, text, "install the same version on all hosts", "all")
    return Check(f"same {name}", OK, ", ".join(set(versions.values())), host="all")


def _ping(name: str, hosts: list[Host], job: Job, ssh: Ssh, args: argparse.Namespace) -> Check:
    what = f"ping, {name}"
    job = replace(job, program=[*job.program, name, str(args.timeout / 2)])
    try:
        check_job(hosts, job, args.allow_remote)
    except RemoteCommandError as error:
        return Check(what, WARN, "not tried", str(error), "all")
    try:
        run_job(hosts, job, ssh, output=sys.stderr)
    except RemoteCommandError as error:
        return Check(
            what, FAIL, str(error), "see the messages above, and open all ports between the hosts", "all"
        )
    return Check(what, OK, f"{len(hosts) * job.nproc_per_node} ranks; its times stand above", host="all")


def _table(found: list[Check], several: bool) -> Table:
    colours = {OK: "green", WARN: "yellow", FAIL: "red"}
    table = Table(*(["host"] if several else []), "what", "state", "found", "what to do")
    for check in found:
        state = f"[{colours[check.state]}]{check.state}[/]"
        table.add_row(*([check.host] if several else []), check.name, state, check.found, check.remedy)
    return table
