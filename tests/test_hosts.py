r"""Host files: what they may say, and which line is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from partpar.cli.hosts import Host, HostFileError, read_hosts


def _file(tmp_path: Path, text: str, name: str = "hosts.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("10.0.0.1\n\n# a comment\n10.0.0.2  # another\n", [Host("10.0.0.1"), Host("10.0.0.2")]),
        ("b.example 1\na.example 0\n", [Host("a.example"), Host("b.example")]),
        ("10.0.0.1 30050\n10.0.0.2 30050\n", [Host("10.0.0.1", port=30050), Host("10.0.0.2", port=30050)]),
        ("10.0.0.1 22\n10.0.0.2 22\n", [Host("10.0.0.1", ssh_port=22), Host("10.0.0.2", ssh_port=22)]),
        ("ann@gpu-1:2222 29501\n", [Host("gpu-1", "ann", 2222, 29501)]),
        ("fe80::1%eth0\nann@[::1]:2200\n", [Host("fe80::1%eth0"), Host("::1", "ann", 2200)]),
        ("::1 0\n", [Host("::1")]),
    ],
)
def test_lines_of_all_tools_are_read(tmp_path: Path, text: str, hosts: list[Host]) -> None:
    assert read_hosts(_file(tmp_path, text)) == hosts
    pytest.importorskip("yaml")
    assert read_hosts(_file(tmp_path, text, "ip_config.yaml")) == hosts, "as PyG names such a file"


def test_yaml_is_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text = (
        "hosts:\n"
        "  - {address: 10.0.0.2, id: 1, user: ann, ssh_port: 2222}\n"
        "  - address: 10.0.0.1\n    id: 0\n    port: 29501\n    interface: eth1\n"
    )
    first, second = Host("10.0.0.1", port=29501, interface="eth1"), Host("10.0.0.2", "ann", 2222)
    assert read_hosts(_file(tmp_path, text, "hosts.yml")) == [first, second]
    assert read_hosts(_file(tmp_path, "- 10.0.0.1 0\n- ann@10.0.0.2:2222 1\n", "hosts.yaml")) == [
        Host("10.0.0.1"),
        second,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"hosts.txt: expected a line for each host, found none"),
        ("10.0.0.1\n10.0.0.256\n", r"hosts.txt:2: expected an address, found '10.0.0.256'"),
        ("10.0.0.1 1 2\n", r"hosts.txt:1: expected .*, found 3 words"),
        ("# x\n10.0.0.1 ssh\n", r"hosts.txt:2: expected a port or id from 0 to 65535, found 'ssh'"),
        ("10.0.0.1 65536\n", r"hosts.txt:1: expected a port or id"),
        ("10.0.0.1:0\n", r"hosts.txt:1: expected a ssh port from 1 to 65535, found '0'"),
        (
            "-oProxyCommand=x\n",
            r"hosts.txt:1: expected a name or address of a host, found '-oProxyCommand=x'",
        ),
        ("-l@host\n", r"hosts.txt:1: expected a user, found '-l'"),
        ("a;b\n", r"hosts.txt:1: expected a name or address"),
        ("[::1\n", r"hosts.txt:1: expected an address"),
        ("a 0\nb 2\n", r"hosts.txt:1: expected a port from 22, or ids from 0 .*, found 0"),
        ("a 22\nb\na:22\n", r"hosts.txt:3: expected each host once, found a:22 again after line 1"),
        ("a:2222 22\n", r"hosts.txt:1: expected one ssh port, found 2222 and 22"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HostFileError, match=message):
        read_hosts(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- {user: ann}\n", r"hosts.yaml:2: expected address and, if wanted, .*found user"),
        ("- a\n- {address: b, port: 80}\n", r"hosts.yaml:2: expected a port from 1024 to 65535, found '80'"),
        (
            "- {address: a, id: 1}\n- b\n",
            r"hosts.yaml:1: expected ids 0 to 1, or none at all, found the id 1",
        ),
        ("nodes: [a]\n", r"hosts.yaml:1: expected a list under 'hosts', found the keys \['nodes'\]"),
        ("- a\n- [b]\n", r"hosts.yaml:2: expected a host, or a mapping"),
        ("- a\n- {b\n", r"hosts.yaml:3: expected YAML"),
        ("hosts: a\n", r"hosts.yaml:1: expected a list of hosts"),
        ("---\n", r"hosts.yaml:2: expected a list of hosts"),
    ],
)
def test_errors_in_yaml_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(HostFileError, match=message):
        read_hosts(_file(tmp_path, text, "hosts.yaml"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFileError, match=r"none\.txt: expected a file of hosts"):
        read_hosts(tmp_path / "none.txt")


def test_hosts_are_called_and_reached_by_what_the_file_says() -> None:
    host = Host("::1", "ann", 2200)
    assert (host.label, host.target, host.bracketed, host.is_loopback) == (
        "[::1]:2200",
        "ann@::1",
        "[::1]",
        True,
    )
    assert [Host(name).is_loopback for name in ("127.0.0.2", "localhost", "10.0.0.1", "gpu-1")] == [
        True,
        True,
        False,
        False,
    ]
