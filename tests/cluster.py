r"""A cluster on one machine: an sshd of its own with throw-away keys, and two "hosts" that differ in their home.

The server listens on 127.0.0.1 and 127.0.0.2, at a port that was free. Whoever logs in at one of them gets that host's
home, and a ``PATH`` whose first folder is the host's own ``bin``, where a test can hide or replace programs.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

ADDRESSES = ("127.0.0.1", "127.0.0.2")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") or ""
TOOLS = ("ssh", "ssh-keygen")


def missing_tools() -> list[str]:
    r"""Programs that a cluster needs and this machine has not."""
    return [*([] if SSHD else ["sshd"]), *(tool for tool in TOOLS if shutil.which(tool) is None)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    r"""Starts the server in a folder; a context manager.

    Args:
        folder: For keys, configurations and homes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.homes = {address: folder / "homes" / address for address in ADDRESSES}
        self.bins = {address: folder / "bins" / address for address in ADDRESSES}
        self.ssh_config = folder / "ssh_config"
        self.hosts_file = folder / "hosts.txt"
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        for path in (*self.homes.values(), *self.bins.values()):
            path.mkdir(parents=True)
        for name in ("host_key", "key", "wrong_key"):
            self._keygen(name)
        public = (self.folder / "host_key.pub").read_text().split()[:2]
        known = "".join(f"[{address}]:{self.port} {' '.join(public)}\n" for address in ADDRESSES)
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "authorized_keys").write_text((self.folder / "key.pub").read_text())
        self.write_ssh_config(self.ssh_config)
        self.hosts_file.write_text("".join(f"{address}:{self.port}\n" for address in ADDRESSES))
        config = self.folder / "sshd_config"
        config.write_text(self._sshd_config())
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it wants to be jailed
        self._server = subprocess.Popen(
            [SSHD, "-D", "-f", str(config), "-E", str(self.folder / "sshd.log")], stdin=subprocess.DEVNULL
        )
        self._wait_until_it_listens()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.terminate()
        self._server.wait(10)

    def write_ssh_config(self, path: Path, key: str = "key", known_hosts: str = "known_hosts") -> Path:
        r"""A configuration that checks host keys against this cluster's file."""
        lines = [
            "Host *",
            f"  IdentityFile {self.folder / key}",
            "  IdentitiesOnly yes",
            "  IdentityAgent none",
            f"  UserKnownHostsFile {self.folder / known_hosts}",
            "  GlobalKnownHostsFile /dev/null",
            "  StrictHostKeyChecking yes",
            f"  User {getpass.getuser()}",
        ]
        path.write_text("\n".join(lines) + "\n")
        return path

    def only(self, address: str, *programs: str) -> None:
        r"""Leaves a host nothing but these programs, and what a shell has built in."""
        folder = self.bins[address]
        for program in programs:
            found = shutil.which(program)
            assert found is not None, program
            (folder / program).symlink_to(found)
        (folder / ".only").touch()

    def _keygen(self, name: str) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _sshd_config(self) -> str:
        lines = [
            f"Port {self.port}",
            *(f"ListenAddress {address}" for address in ADDRESSES),
            f"HostKey {self.folder / 'host_key'}",
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}",
            f"PidFile {self.folder / 'sshd.pid'}",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
            "Subsystem sftp /usr/lib/openssh/sftp-server",
        ]
        for address in ADDRESSES:
            enter = self.folder / f"enter-{address}"
            enter.write_text(
                "#!/bin/sh\n"
                f"export HOME={self.homes[address]} XDG_CACHE_HOME={self.homes[address]}/.cache\n"
                f"if [ -e {self.bins[address]}/.only ]; then PATH={self.bins[address]}; "
                f"else PATH={self.bins[address]}:$PATH; fi\n"
                'export PATH\ncd "$HOME" && exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
            )
            enter.chmod(0o755)
            lines += [f"Match LocalAddress {address}", f"  ForceCommand {enter}"]
        return "\n".join(lines) + "\n"

    def _wait_until_it_listens(self) -> None:
        for address in ADDRESSES:
            for _ in range(100):
                try:
                    socket.create_connection((address, self.port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                raise RuntimeError(f"sshd does not listen: {(self.folder / 'sshd.log').read_text()}")
