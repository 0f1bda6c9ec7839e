"""What vmwrapper costs, in one command: stages, overhead, round trip, file transfer, CPU and memory.

    python -m bench.overview [--rounds N] [--compute S] [--no-transfer]

Everything is measured with the real parts: the worker example in a QEMU guest, through the embedded broker and through
ActiveMQ in turns, so that both see the same noise. Times are medians.

- stages: seconds from the exec of vmwrapper, as it writes them into stderr.txt;
- overhead: wall time minus the guest's boot (from HostMain's order to start the VM, as its log tells, to the agent)
  minus the worker's own run time;
- ping: XML-RPC ping(vm) from a client on this computer, through HostMain and the broker into the guest and back;
- transfer: `bench.transfer`, next to a plain TCP copy through the same port forward;
- load: CPU and memory of each of our processes while the guest computes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import psutil

from tests.support.owned import owned
from tools.demo import lay_out

ROOT = Path(__file__).resolve().parent.parent
BROKERS = ("embedded", "activemq")
STAGES = ("broker ready", "VM booted", "agent there", "files in", "run", "files out", "done")
RUN_LIMIT_S = 300
PINGS = 200


@dataclass
class Round:
    """One run of the worker example."""

    stages: dict[str, float]
    wall_s: float
    worker_s: float
    vm_start_s: float

    @property
    def boot_s(self) -> float:
        return self.stages["agent there"] - self.vm_start_s

    @property
    def overhead_s(self) -> float:
        return self.wall_s - self.boot_s - self.worker_s


@dataclass
class Load:
    """What the processes of one run cost while the guest computed."""

    pings_ms: list[float] = field(default_factory=list)
    rows: list[tuple[str, float, float]] = field(default_factory=list)
    """Process, percent of a core, MiB resident (unique set where the system tells)."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overview", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of the example with each broker")
    parser.add_argument("--compute", type=float, default=60.0, help="seconds of computing for the load table")
    parser.add_argument("--no-transfer", action="store_true")
    options = parser.parse_args()
    rounds: dict[str, list[Round]] = {broker: [] for broker in BROKERS}
    for _ in range(options.rounds):
        for broker in BROKERS:
            rounds[broker].append(one_round(broker))
    print_stages(rounds)
    loads = {broker: load(broker, options.compute) for broker in BROKERS}
    print_loads(loads, options.compute)
    if not options.no_transfer:
        print("\nfile transfer (python -m bench.transfer)", flush=True)
        subprocess.run([sys.executable, "-m", "bench.transfer"], cwd=ROOT, check=True)


def compiled() -> dict[str, str]:
    """An environment in which Python keeps compiled modules, as an installed package has them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@contextmanager
def running(broker: str, cpu_seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], Path, float]]:
    """The example in a fresh slot: process, slot, time of its exec."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        slot = Path(folder)
        with redirect_stdout(sys.stderr):  # what the demo says
            lay_out(slot, broker=broker, hypervisor="qemu")
        suffix = "" if broker == "embedded" else "-activemq"
        job = (ROOT / "examples" / "worker" / f"job{suffix}.xml").read_text()
        command = f"<command_line>{cpu_seconds:g}</command_line>"
        (slot / "job.xml").write_text(job.replace("<command_line>5</command_line>", command))
        began = time.monotonic()
        wrapper = subprocess.Popen(
            owned([sys.executable, "-m", "vmwrapper", "job.xml"], "TERM"),
            cwd=slot,
            env=compiled(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield wrapper, slot, began
        finally:
            if wrapper.poll() is None:
                wrapper.terminate()
                wrapper.wait(60)


def one_round(broker: str) -> Round:
    """Run the example to its end. Raises RuntimeError with its story when it failed."""
    with running(broker, 5) as (wrapper, slot, began):
        began_at = datetime.now() - timedelta(seconds=time.monotonic() - began)
        status = wrapper.wait(RUN_LIMIT_S)
        wall = time.monotonic() - began
        story = (slot / "stderr.txt").read_text()
        host_story = (slot / "stderr_HostMain").read_text()
    if status != 0:
        raise RuntimeError(f"the example ended with {status}:\n{story}")
    told = re.search(r"done: (.* s)$", story, re.MULTILINE)
    worker = re.search(r"ended in the guest after ([\d.]+) s", story)
    started = re.search(r"^(\S+ \S+) .*: starting from", host_story, re.MULTILINE)
    if told is None or worker is None or started is None:
        raise RuntimeError(f"no timeline in:\n{story}\n{host_story}")
    vm_start = datetime.strptime(started[1], "%Y-%m-%d %H:%M:%S,%f") - began_at
    stages = {name: float(seconds) for name, seconds in re.findall(r"([A-Za-z ]+?) ([\d.]+) s", told[1])}
    named = {name.strip(): value for name, value in stages.items()}
    return Round(named, wall, float(worker[1]), vm_start.total_seconds())


def load(broker: str, seconds: float) -> Load:
    """CPU and memory of every process of a run while its guest computes for `seconds`, and pings meanwhile."""
    result = Load()
    # The guest is emulated where there is no hardware virtualization: give it more work than the time we look at.
    with running(broker, seconds + 30) as (wrapper, slot, _):
        wait_for(slot / "stderr.txt", "running ./worker.py", wrapper)
        tree = [psutil.Process(wrapper.pid), *psutil.Process(wrapper.pid).children(recursive=True)]
        host = next(process for process in tree if "vmcontrol.hostmain" in " ".join(process.cmdline()))
        before = {process: cpu_seconds(process) for process in tree}
        began = time.monotonic()
        time.sleep(seconds)
        span = time.monotonic() - began
        for process in tree:
            if process.is_running():
                used = cpu_seconds(process) - before[process]
                result.rows.append((name_of(process), 100 * used / span, process.memory_info().rss / 2**20))
        secret = host.environ()["VMWRAPPER_XMLRPC_SECRET"]
        port = json.loads((slot / "vmwrapper_ports.json").read_text())["xmlrpc"]
        server = xmlrpc.client.ServerProxy(f"http://vmwrapper:{secret}@127.0.0.1:{port}/RPC2", allow_none=True)
        names = server.listRegisteredVMs()
        if not isinstance(names, list) or not names:
            raise RuntimeError("no guest is registered")
        for _ in range(PINGS):
            sent = time.monotonic()
            server.ping(names[0])
            result.pings_ms.append(1000 * (time.monotonic() - sent))
    return result


def wait_for(path: Path, text: str, wrapper: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + RUN_LIMIT_S
    while time.monotonic() < deadline and wrapper.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.2)
    raise RuntimeError(f"{text!r} never came: {path.read_text() if path.exists() else 'no stderr.txt'}")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def name_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for part, name in (
        ("vmcontrol.hostmain", "HostMain"),
        ("vmwrapper.process.supervisor", "supervisor"),
        ("qemu-system", "QEMU"),
        ("activemq.jar", "ActiveMQ"),
        ("-m vmwrapper", "vmwrapper"),
    ):
        if part in line:
            return name
    return process.name()


def print_stages(rounds: dict[str, list[Round]]) -> None:
    print(f"seconds from exec, median of {len(rounds['embedded'])} runs\n")
    print(f"| {'stage':24} | embedded | ActiveMQ | ratio |\n| --- | --- | --- | --- |")
    for stage in STAGES:
        row(stage, *(statistics.median(one.stages[stage] for one in rounds[broker]) for broker in BROKERS))
    row("wall time", *(statistics.median(one.wall_s for one in rounds[broker]) for broker in BROKERS))
    row("  guest's boot", *(statistics.median(one.boot_s for one in rounds[broker]) for broker in BROKERS))
    row("  worker", *(statistics.median(one.worker_s for one in rounds[broker]) for broker in BROKERS))
    row("  overhead", *(statistics.median(one.overhead_s for one in rounds[broker]) for broker in BROKERS))


def row(name: str, embedded: float, activemq: float) -> None:
    print(f"| {name:24} | {embedded:8.2f} | {activemq:8.2f} | {embedded / activemq:5.2f} |", flush=True)


def print_loads(loads: dict[str, Load], seconds: float) -> None:
    for broker, measured in loads.items():
        print(f"\nwhile the guest computes for {seconds:g} s, broker {broker}\n")
        print("| process | % of a core | MiB resident |\n| --- | --- | --- |")
        for name, percent, memory in measured.rows:
            print(f"| {name} | {percent:.2f} | {memory:.0f} |")
        ours = [(percent, memory) for name, percent, memory in measured.rows if name in ("vmwrapper", "HostMain")]
        print(f"| vmwrapper + HostMain | {sum(o[0] for o in ours):.2f} | {sum(o[1] for o in ours):.0f} |")
        ordered = sorted(measured.pings_ms)
        print(
            f"\nping through {broker}: median {statistics.median(ordered):.1f} ms, "
            f"95 % below {ordered[int(0.95 * len(ordered))]:.1f} ms ({len(ordered)} pings)",
            flush=True,
        )


if __name__ == "__main__":
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("bench: qemu-system-x86_64 is not installed; tools/setup check installs it")
    main()
