"""Throughput of the file transfer in both directions, next to a plain TCP copy through the same kind of port forward.

    python -m bench.transfer [--image guest.vdi] [--size MB] [--rounds N] [--cpus N]

Boots the guest image under QEMU. The plain copy is a Python program in the guest that reads or writes a file in pieces
of 1 MiB, with an fsync at the end of a put, started through the agent; it computes no digest. Rounds take turns, so
that both see the same noise: a ratio is that of two copies in a row, and the table has the medians. Processor time is
QEMU's, and less disturbed by other work on the machine than the speed is.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor as global_reactor
from twisted.internet.threads import deferToThread

from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.common import eventloop
from vmcontrol.hypervisors.choose import open_hypervisor
from vmcontrol.hypervisors.interface import VmSpec
from vmcontrol.link.dialler import GuestLink
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.messages import CommandRun, encode
from vmcontrol.protocol.vm import PortForward
from vmcontrol.stomp.client import StompClient
from vmcontrol.transfer.http import HttpTransfer

reactor: Any = global_reactor
PLAIN_PORT = 5001
PLAIN = """
import os, socket
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 5001))
s.listen(5)
buffer = memoryview(bytearray(1 << 20))
while True:
    c, _ = s.accept()
    what = c.recv(1)
    if what == b"p":
        with open("plain", "wb", buffering=0) as f:
            while n := c.recv_into(buffer):
                f.write(buffer[:n])
            os.fsync(f.fileno())
        c.sendall(b"k")
    elif what == b"g":
        with open("plain", "rb", buffering=0) as f:
            while n := f.readinto(buffer):
                c.sendall(buffer[:n])
    else:
        c.sendall(b"k")
    c.close()
"""


def plain(what: bytes, port: int, local: Path) -> float:
    """Seconds of a plain copy. Blocks."""
    started = time.monotonic()
    buffer = memoryview(bytearray(1 << 20))
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        connection.sendall(what)
        if what == b"p":
            with local.open("rb", buffering=0) as content:
                while count := content.readinto(buffer):
                    connection.sendall(buffer[:count])
            connection.shutdown(socket.SHUT_WR)
            if connection.recv(1) != b"k":
                raise OSError("the plain copy broke")
        else:
            with local.open("wb", buffering=0) as out:
                while count := connection.recv_into(buffer):
                    out.write(buffer[:count])
                os.fsync(out.fileno())
    return time.monotonic() - started


async def start_plain_server(link: GuestLink, broker: tuple[str, int, str, str], guest: str, port: int) -> None:
    """Run PLAIN in the guest; returns when it answers."""
    host = StompClient(reactor, name="bench", reconnect=True)
    host.connect(*broker)
    with tempfile.NamedTemporaryFile() as script:
        script.write(PLAIN.encode())
        script.flush()
        await HttpTransfer(link).put(Path(script.name), "plain.py")
    words = encode(CommandRun(guest, "bench", "/usr/bin/python3", ("plain.py",), folder="."))

    def answers() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            try:
                connection.sendall(b"?")
                return connection.recv(1) == b"k"
            except OSError:
                return False

    for _ in range(100):
        if host.connected:
            await host.send(words)
        await eventloop.sleep(reactor, 0.5)
        if host.connected and await deferToThread(answers):
            break
    await host.close()


async def measure(options: argparse.Namespace, folder: Path) -> None:
    image = options.image
    if image is None:
        image = folder / "guest.vdi"
        await deferToThread(subprocess.run, [sys.executable, "-m", "guest.image.build", str(image)], check=True)
    secret = secrets.token_hex(32)
    secret_file = folder / "secret"
    secret_file.write_text(secret)
    secret_file.chmod(0o600)
    big, back = folder / "big", folder / "back"
    with big.open("wb") as out:
        for _ in range(options.size):
            out.write(os.urandom(1000) * 1000)
    broker = EmbeddedBroker(reactor, login="bench", passcode=secret)
    at = ("127.0.0.1", broker.listen(), "bench", secret)
    hypervisor = await open_hypervisor("QEMU", reactor, folder / "vm")
    spec = VmSpec(
        name="bench",
        image=image,
        folder=folder / "vm" / "bench",
        memory_mb=256,
        cpus=options.cpus,
        agent_port=AGENT_PORT,
        secret_file=secret_file,
        console_log=folder / "console.log",
        port_forwards=(PortForward(PLAIN_PORT),),
    )
    link: GuestLink | None = None
    try:
        await hypervisor.create(spec)
        started = time.monotonic()
        await hypervisor.start("bench")
        info = await hypervisor.info("bench")
        if info.agent_address is None:
            raise RuntimeError("the VM has no way to its agent")
        link = GuestLink(
            reactor, name="bench", address=info.agent_address, secret=secret.encode("ascii"), broker=lambda: broker
        )
        link.start()
        await link.wait_up(120)
        print(f"agent reached {time.monotonic() - started:.2f} s after the VM's start")
        status = await link.status()
        print(f"(it had booted {status['uptime_s']:.2f} s before it answered its first HTTP request)")
        port = info.forwards[PLAIN_PORT]
        await start_plain_server(link, at, str(status["id"]), port)
        files = HttpTransfer(link)
        copies: dict[str, Callable[[], Awaitable[object]]] = {
            "plain put": lambda: deferToThread(plain, b"p", port, big),
            "put": lambda: files.put(big, "copied"),
            "plain get": lambda: deferToThread(plain, b"g", port, back),
            "get": lambda: files.get("copied", back),
        }
        seconds: dict[str, list[float]] = {name: [] for name in copies}
        cpu: dict[str, list[float]] = {name: [] for name in copies}
        for number in range(options.rounds):
            # Every other round the other way round: neither copy always has the other's dirty pages behind it.
            pairs = [("plain put", "put"), ("plain get", "get")]
            for name in (name for pair in pairs for name in (pair if number % 2 else pair[::-1])):
                before, began = (await hypervisor.performance("bench"))["cpu_time_s"], time.monotonic()
                await copies[name]()
                seconds[name].append(time.monotonic() - began)
                cpu[name].append((await hypervisor.performance("bench"))["cpu_time_s"] - before)
        print("| direction | plain MB/s | transfer MB/s | ratio | plain CPU ms/MB | transfer CPU ms/MB | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for way in ("put", "get"):
            row = [options.size / statistics.median(seconds[name]) for name in (f"plain {way}", way)]
            row.append(statistics.median(p / t for p, t in zip(seconds[f"plain {way}"], seconds[way], strict=True)))
            row += [1000 * statistics.median(cpu[name]) / options.size for name in (f"plain {way}", way)]
            row.append(statistics.median(p / t for p, t in zip(cpu[f"plain {way}"], cpu[way], strict=True)))
            print(
                f"| {way} | "
                + " | ".join(f"{number:.1f}" if i in (0, 1, 3, 4) else f"{number:.2f}" for i, number in enumerate(row))
                + " |"
            )
    finally:
        if link is not None:
            await link.stop()
        await hypervisor.power_off("bench")
        await hypervisor.delete("bench")
        await hypervisor.close()
        await broker.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size", type=int, default=200, help="MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    options = parser.parse_args()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        done = eventloop.start(measure(options, Path(folder)))
        done.addErrback(lambda failure: failed.append(failure.getTraceback()))
        done.addBoth(lambda _: reactor.stop())
        reactor.run()
        print(*failed, file=sys.stderr)
        if failed and (Path(folder) / "console.log").exists():
            print((Path(folder) / "console.log").read_text(errors="replace")[-3000:])
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
