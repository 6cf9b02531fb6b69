r"""``partpar launch``: start the same training script on several hosts."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from rich.console import Console

from partpar.cli.copy import add_ssh_arguments
from partpar.cli.fleet import Member, run_fleet
from partpar.cli.hosts import Host, read_hosts
from partpar.cli.keep import NO_WORKSPACE, PORT_TAKEN
from partpar.cli.ssh import SSH_FAILED, RemoteCommandError, Ssh, connection_problem
from partpar.variables import NETWORK_FLAG, THREADS_FLAG

EXAMPLE = "partpar launch --hosts hosts.txt --workspace /data/run --nproc-per-node 2 --allow-remote -- train.py --epochs 5"
DEFAULT_PORT = 29500
# As for workers of one machine: each sets its own number of threads, and large blocks are made cheap.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", NETWORK_FLAG: "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    add_ssh_arguments(parser)
    parser.add_argument(
        "--workspace",
        required=True,
        metavar="DIR",
        help="folder at the far end to run in; relative to the home there",
    )
    add_far_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument(
        "program", nargs="+", metavar="-- train.py ARGS", help="script in the workspace, or -m MODULE"
    )


def add_far_arguments(parser: argparse._ActionsContainer) -> None:
    r"""Declares how workers are started at the far end."""
    parser.add_argument(
        "--nproc-per-node", type=int, default=1, metavar="N", help="workers on each host (default: 1)"
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="for the workers; may be repeated; others can see it in ps",
    )
    parser.add_argument(
        "--python",
        default="python3",
        metavar="PATH",
        help="Python at the far end, where partpar is installed (default: python3)",
    )
    parser.add_argument(
        "--prelude",
        metavar="LINE",
        help="shell line to run first at the far end, such as 'source .venv/bin/activate'",
    )
    parser.add_argument(
        "--master-addr",
        metavar="ADDRESS",
        help="of the first host for the others, if ssh knows it by another name",
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="P",
        help=f"where the workers meet (default: of the first host, or {DEFAULT_PORT})",
    )
    parser.add_argument(
        "--interface", metavar="NAME", help="network interface (default: by the first host's address)"
    )
    parser.add_argument(
        "--join-timeout",
        type=int,
        default=120,
        metavar="S",
        help="seconds until all hosts must have met (default: 120)",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let workers talk over the network, without authentication or encryption: it must be trusted or tunnelled",
    )


@dataclass(frozen=True)
class Job:
    r"""What is to run on all hosts.

    Args:
        workspace: Folder at the far end.
        program: A script and its arguments, or ``-m``, a module and its arguments.
        nproc_per_node: Workers on each host.
        env: Environment variables for them.
        python: Interpreter at the far end.
        prelude: A line of bash to run first, or :obj:`None`.
        master_addr: Address of the first host for the others, or :obj:`None` for that in the hosts file.
        port: Where the workers meet there, or :obj:`None` for that of the first host.
        interface: Network interface of all hosts that name none, or :obj:`None` to find it.
        join_timeout: Seconds until all hosts must have met.
    """

    workspace: str
    program: Sequence[str]
    nproc_per_node: int = 1
    env: dict[str, str] = field(default_factory=dict)
    python: str = "python3"
    prelude: str | None = None
    master_addr: str | None = None
    port: int | None = None
    interface: str | None = None
    join_timeout: int = 120

    def words(self, hosts: Sequence[Host], number: int) -> list[str]:
        r"""The words to run on one of the hosts."""
        master, host = self.master_addr or hosts[0].address, hosts[number]
        port = self.port or hosts[0].port or DEFAULT_PORT
        interface = host.interface or self.interface
        keeper = ["-m", "partpar.cli.keep", *(["--listens-at", str(port)] if number == 0 else [])]
        if interface is not None:
            keeper += ["--interface", interface]
        elif len(hosts) > 1:
            # The first host has many ways to itself; the one to the second is the one it will need.
            keeper += ["--towards", hosts[1].address if number == 0 else master]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--node-rank", str(number)]
        torchrun += ["--nproc-per-node", str(self.nproc_per_node)]
        torchrun += ["--master-addr", master, "--master-port", str(port)]
        torchrun += ["--rdzv-conf", f"timeout={self.join_timeout}"]
        kept = {THREADS_FLAG: "1"} if "OMP_NUM_THREADS" in self.env else {}
        settings = [f"{name}={value}" for name, value in {**_ENVIRONMENT, **kept, **self.env}.items()]
        inner = ["env", *settings, self.python, *keeper, "--", self.python, *torchrun, *self.program]
        return self.shell(inner)

    def shell(self, words: Sequence[str]) -> list[str]:
        r"""Words that run others in the workspace, after the prelude."""
        prelude = "" if self.prelude is None else f"{self.prelude}\n"
        script = f'cd -- "$1" || exit {NO_WORKSPACE}; shift; {prelude}exec "$@"'
        return ["sh" if self.prelude is None else "bash", "-c", script, "partpar", self.workspace, *words]

    @classmethod
    def of(cls, args: argparse.Namespace, program: Sequence[str]) -> Job:
        r"""The job that the options describe."""
        return cls(
            workspace=args.workspace,
            program=program,
            nproc_per_node=args.nproc_per_node,
            env=dict(_setting(text) for text in args.env),
            python=args.python,
            prelude=args.prelude,
            master_addr=args.master_addr,
            port=args.port,
            interface=args.interface,
            join_timeout=args.join_timeout,
        )


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Starts, waits, and returns 0 if all hosts ended well."""
    hosts = read_hosts(args.hosts)
    job = Job.of(args, args.program)
    check_job(hosts, job, args.allow_remote)
    ssh = Ssh(args.ssh_config, args.connect_timeout)
    if args.dry_run:
        for number, host in enumerate(hosts):
            print(shlex.join(ssh.command(host, job.words(hosts, number))))
        return 0
    run_job(hosts, job, ssh)
    return 0


def check_job(hosts: Sequence[Host], job: Job, allow_remote: bool) -> None:
    r"""Refuses what could not work, or what nobody allowed, before any host is asked.

    Raises:
        RemoteCommandError: With the remedy.
    """
    if job.nproc_per_node < 1:
        raise RemoteCommandError(f"--nproc-per-node: expected at least 1, found {job.nproc_per_node}")
    if job.port is not None and not 1024 <= job.port <= 65535:
        raise RemoteCommandError(f"--port: expected 1024 to 65535, found {job.port}")
    near = [host.label for host in hosts if host.is_loopback]
    far = [host.label for host in hosts if not host.is_loopback]
    if near and far:
        raise RemoteCommandError(
            f"{near[0]}: expected an address that {far[0]} can reach, found one of this machine alone; write its address "
            "in the network into the hosts file"
        )
    if len(far) > 1 and not allow_remote:
        raise RemoteCommandError(
            f"workers on {', '.join(far)} would talk over the network, without authentication or encryption; if it is "
            "trusted or tunnelled, pass --allow-remote"
        )


def run_job(hosts: Sequence[Host], job: Job, ssh: Ssh, output: IO[str] | None = None) -> None:
    r"""Runs a job until all hosts have ended well.

    Args:
        hosts: Where.
        job: What.
        ssh: How to reach them.
        output: Where the workers' standard output goes; by default where this process's goes.

    Raises:
        RemoteCommandError: If one fails; all others were ended.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after all were ended.
    """
    members = [
        Member(host.label, ssh.command(host, job.words(hosts, number)), output or sys.stdout)
        for number, host in enumerate(hosts)
    ]

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        failed = run_fleet(members)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is not None:
        host = hosts[members.index(failed)]
        raise RemoteCommandError(_explain(host, hosts, job, failed))


def _explain(host: Host, hosts: Sequence[Host], job: Job, failed: Member) -> str:
    r"""Why a host failed and what to do."""
    code, said = failed.process.returncode, "\n".join(failed.tail)
    others = "" if len(hosts) == 1 else "; the other hosts were ended"
    label = host.label
    if code == SSH_FAILED:
        known = connection_problem(host, said)
        return (
            known + others
            if known
            else f"{label}: ssh lost the connection{others}; what it said stands above"
        )
    if code == NO_WORKSPACE:
        return f"{label}: no folder {job.workspace}; bring one there first: partpar copy --workspace {job.workspace} …{others}"
    if code == PORT_TAKEN:
        reason = failed.tail[-1] if failed.tail else ""
        return f"{label}: the workers cannot meet there: {reason}; end what listens there or pass another --port{others}"
    if code in (126, 127):
        return f"{label}: {job.python} cannot be run there; name Python by --python, or set it up by --prelude{others}"
    if re.search(r"No module named '?(partpar|torch)\b", said):
        return f"{label}: {job.python} there has no partpar; install it, or name another Python by --python or --prelude{others}"
    ended = f"was ended by signal {code - 128}" if code > 128 else f"failed with exit code {code}"
    return f"{label}: torchrun there {ended}{others}; its messages stand above"


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise RemoteCommandError(f"--env: expected NAME=VALUE, found {text!r}")
    return name, value
