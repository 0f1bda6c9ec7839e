"""HostMain, or the whole wrapper, with guests that attack: the hypervisor of tests.support_hypervisor, whose "VMs" are
tests.integration.hostile_agent here.

    python -m tests.support.hostile_world HostConfig.cfg          HostMain
    python -m tests.support.hostile_world wrapper JOB_FILE        the wrapper, with that HostMain

The attack is the one whose name is in the file GO of the slot.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.support.agenthost import GUEST_ID
from tests.support.brokers import free_port
from tests.support.hypervisor import FakeHypervisor, _Agent, _Vm
from vmcontrol.hostmain import main as hostmain
from vmcontrol.hypervisors.interface import Hypervisor
from vmwrapper.cli.arguments import parse_arguments
from vmwrapper.options import RunOptions
from vmwrapper.run import messages
from vmwrapper.run.ending import leave
from vmwrapper.run.run import run_job

GO = "attack.go"
MODULE = "tests.support.hostile_world"


class HostileHypervisor(FakeHypervisor):
    """Its guests attack."""

    def _spawn(self, vm: _Vm) -> None:
        vm.address = ("127.0.0.1", free_port())
        words = [
            sys.executable, "-m", "tests.support.hostile_agent", str(vm.address[1]), str(vm.spec.secret_file),
            GUEST_ID, str(self._slot / GO),
        ]  # fmt: skip
        log = os.open(self._slot / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        vm.process = self._reactor.spawnProcess(
            _Agent(self, vm), words[0], words, environment, childFDs={0: 0, 1: log, 2: log}
        )
        os.close(log)


async def open_hostile(kind: str, reactor: Any, folder: Path) -> Hypervisor:
    """In place of choose.open_hypervisor."""
    return HostileHypervisor(reactor, folder)


def main() -> NoReturn:
    """The program."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if sys.argv[1] != "wrapper":
        sys.exit(hostmain.main(sys.argv[1:], open_hypervisor=open_hostile))
    messages.GUEST_LOOK_S = 0.5  # an attack lasts a second
    options = parse_arguments(sys.argv[2:], under_client=False, environment=os.environ, is_file=os.path.isfile)
    assert isinstance(options, RunOptions)
    leave(run_job(options, host_main=[sys.executable, "-m", MODULE]))


if __name__ == "__main__":
    main()
