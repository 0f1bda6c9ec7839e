"""What a guest can reach: nothing at all, unless its job was granted the network; then not the host's own loopback.

Two VMs, booted together. `shut` has the default link, and a system that was made hostile: a default route to QEMU's
gateway, as root in the guest could add one. So it is the hypervisor that is tested, not the guest's good will. `open`
has the granted network and the image as it is; it also shows that the same probe finds what can be reached.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from guest.image import build, tools
from tests.support.real_guests import RealHost, real_hostmain, real_image

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

GUI_RPC_PORT = 31416
"""Of the BOINC client, on the loopback of every volunteer's computer."""
SLIRP = ["10.0.2.1", "10.0.2.2", "10.0.2.3", "10.0.2.4", "10.0.2.100", "10.0.2.254"]
"""Addresses that QEMU's user network may answer at: host, DNS, SMB, forwards."""
OTHERS = ["10.0.3.2", "10.0.3.3", "10.1.2.3", "172.16.0.1", "192.168.1.1", "192.168.56.1", "169.254.169.254"]
PUBLIC = ["1.1.1.1", "8.8.8.8", "193.0.6.139"]

PROBE = """
import errno, json, select, socket, sys, time
targets, limit = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found, waiting = {}, {}
for kind, address, port in targets:
    name = f"{kind} {address}:{port}"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.setblocking(False)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    try:
        if kind == "tcp":
            code = s.connect_ex((address, port))
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, errno.errorcode[code])
        else:
            s.connect((address, port))
            s.send(b"anybody there?")
    except OSError as error:
        found[name] = f"failed: {error}"
        continue
    waiting[s] = name
end = time.monotonic() + limit
while waiting and time.monotonic() < end:
    read = [s for s in waiting if s.type == socket.SOCK_DGRAM]
    write = [s for s in waiting if s.type == socket.SOCK_STREAM]
    read, write, _ = select.select(read, write, [], max(0, end - time.monotonic()))
    for s in read + write:
        name = waiting.pop(s)
        error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if error:
                raise OSError(error, errno.errorcode[error])
            if s.type == socket.SOCK_DGRAM:
                found[name] = "reached: " + s.recv(100).decode(errors="replace")
            else:
                found[name] = "reached"
        except OSError as error:
            found[name] = f"failed: {error}"
for name in waiting.values():
    found[name] = "failed: no answer"
print(json.dumps(found))
"""


class Listener:
    """Takes TCP connections and answers datagrams, and notes what came."""

    def __init__(self, address: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.tcp = socket.create_server((address, port), family=family)
        self.address = address
        self.port: int = self.tcp.getsockname()[1]
        self.udp = socket.socket(family, socket.SOCK_DGRAM)
        self.udp.bind((address, self.port))
        self.came: list[str] = []
        for work in (self._tcp, self._udp):
            threading.Thread(target=work, daemon=True).start()

    def _tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.tcp.accept()
                self.came.append("tcp")
                connection.close()

    def _udp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, peer = self.udp.recvfrom(100)
                if peer is None:
                    return  # shut down
                self.came.append("udp")
                self.udp.sendto(b"here I am", peer)

    def close(self) -> None:
        for one in (self.tcp, self.udp):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def own_addresses() -> list[str]:
    """This computer's addresses beyond loopback."""
    every = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    return [a.address for a in every if a.family == socket.AF_INET and not a.address.startswith("127.")]


@pytest.fixture(scope="module")
def loopback() -> Iterator[Listener]:
    """Stands for the client's GUI RPC; on its own port unless a real client has that."""
    try:
        listener = Listener("127.0.0.1", GUI_RPC_PORT)
    except OSError:
        listener = Listener("127.0.0.1")
    yield listener
    listener.close()


@pytest.fixture(scope="module")
def outside() -> Iterator[list[Listener]]:
    listeners = [Listener(address) for address in own_addresses()]
    yield listeners
    for listener in listeners:
        listener.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHost]:
    image = real_image()
    files = tmp_path_factory.mktemp("hostile")
    boot = files / "etc/init.d/boot"
    boot.parent.mkdir(parents=True)
    shutil.copy(tools.FILES / "system/etc/init.d/boot", boot)
    with boot.open("a") as script:
        script.write("ip route add default via 10.0.2.2 dev eth0\nip -6 route add default dev eth0\n")
        script.write("echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6\n")
    hostile = real_image(build.Options(files=files))
    with real_hostmain(tmp_path_factory.mktemp("slot")) as host:
        host.define("shut", hostile)
        host.define("open", image, network=True)
        host.wait_up("shut")
        host.wait_up("open")
        yield host


def probe(host: RealHost, vm: str, targets: list[tuple[str, str, int]], limit_s: float = 4.0) -> dict[str, str]:
    found: Any = host.python(vm, PROBE, targets, limit_s)
    assert len(found) == len(set(targets))
    return dict(found)


def both(address: str, port: int) -> list[tuple[str, str, int]]:
    return [("tcp", address, port), ("udp", address, port)]


def test_a_guest_reaches_nothing_even_if_root_in_it_tries(
    host: RealHost, loopback: Listener, outside: list[Listener]
) -> None:
    assert "default via 10.0.2.2 dev eth0" in host.run("shut", "ip", "route")["output"], "not the hostile system"
    targets = [target for address in (*SLIRP, *OTHERS, *PUBLIC) for target in both(address, loopback.port)]
    for listener in outside:
        targets += both(listener.address, listener.port)
    for address in (*SLIRP, *PUBLIC):
        targets += [*both(address, 53), ("tcp", address, 80), ("udp", address, 69)]
    targets += [("udp", "255.255.255.255", loopback.port), ("udp", "10.0.2.255", loopback.port)]
    targets += [("tcp", "2001:4860:4860::8888", 53), ("udp", "fec0::2", loopback.port)]
    assert host.event("broker")["port"] is None
    targets.append(("tcp", "10.0.2.2", host.port))
    found = probe(host, "shut", targets)
    assert {name: text for name, text in found.items() if not text.startswith("failed")} == {}
    assert loopback.came == []
    assert [listener.came for listener in outside] == [[] for _ in outside]


def test_a_granted_network_leads_out_but_not_to_the_hosts_loopback(
    host: RealHost, loopback: Listener, outside: list[Listener]
) -> None:
    """Here the probe reaches something: it can tell the difference."""
    targets = both("10.0.3.2", loopback.port) + both("10.0.2.2", loopback.port) + both("10.0.3.4", loopback.port)
    for listener in outside:
        targets += both(listener.address, listener.port)
    found = probe(host, "open", targets)
    assert loopback.came == []
    for address in ("10.0.3.2", "10.0.2.2", "10.0.3.4"):
        for kind in ("tcp", "udp"):
            assert found[f"{kind} {address}:{loopback.port}"].startswith("failed"), found
    assert "Permission" in found[f"tcp 10.0.3.2:{loopback.port}"] or "EACCES" in found[f"tcp 10.0.3.2:{loopback.port}"]
    if not outside:
        pytest.skip("this computer has no address beyond loopback: that the probe can succeed is not shown")
    for listener in outside:
        assert found[f"tcp {listener.address}:{listener.port}"] == "reached"
        assert found[f"udp {listener.address}:{listener.port}"] == "reached: here I am"
        assert set(listener.came) == {"tcp", "udp"}


def test_names_are_asked_at_the_address_beside_the_forbidden_one(host: RealHost) -> None:
    assert "nameserver 10.0.3.3" in host.run("open", "cat", "/etc/resolv.conf")["output"]
    assert "via 10.0.3.2" not in host.run("open", "ip", "route", "get", "10.0.3.3")["output"]
    routes = host.run("open", "ip", "route")["output"]
    assert "default via 10.0.3.2 dev eth1" in routes
    assert "prohibit 10.0.3.2" in routes
    # QEMU passes a query on to this computer's own name server: answered there, it must be answered here.
    query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01"
    ask = (
        "import json, socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(3)\n"
        "s.sendto(bytes.fromhex(json.loads(sys.argv[2])), (json.loads(sys.argv[1]), 53))\n"
        "try:\n    print(json.dumps(s.recv(2000).hex()[:4]))\nexcept OSError as error:\n    print('null')"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as direct:
        direct.settimeout(2)
        try:
            servers = [
                line.split()[1] for line in Path("/etc/resolv.conf").read_text().splitlines() if "nameserver" in line
            ]
            direct.sendto(query, (servers[0], 53))
            direct.recv(2000)
        except (OSError, IndexError):
            return  # no name server here to pass anything on to
    assert host.python("open", ask, "10.0.3.3", query.hex()) == "1234"


def test_the_network_is_pulled_and_plugged_while_the_agents_link_stays(host: RealHost, outside: list[Listener]) -> None:
    if not outside:
        pytest.skip("this computer has no address beyond loopback")
    target = both(outside[0].address, outside[0].port)
    before = host.log().count("link to open is down")
    assert host.api.setNetwork("open", False) is True
    assert all(text.startswith("failed") for text in probe(host, "open", target, 3).values())
    assert host.api.setNetwork("open", True) is True
    assert all(text.startswith("reached") for text in probe(host, "open", target, 20).values())
    assert host.log().count("link to open is down") == before


def test_memory_that_the_guest_has_not(host: RealHost) -> None:
    """Bit by bit: the kernel ends the program, which is 'out of memory'. All at once: the program is refused, and its
    own way of going on or ending is what counts."""
    greedy = host.run("shut", "python3", "-c", "kept = []\nwhile True: kept.append(bytearray(8 << 20))")
    assert greedy["out_of_memory"] is True, greedy
    assert greedy["signal"] == 9
    careful = "import sys\ntry: bytearray(8 << 30)\nexcept MemoryError: print('then without'); sys.exit(3)"
    refused = host.run("shut", "python3", "-c", careful)
    assert (refused["exit_status"], refused["output"], refused["out_of_memory"]) == (3, "then without\n", False)
    assert host.run("shut", "echo", "still there")["output"] == "still there\n"
