"""RabbitMQ with its STOMP plug-in as an ordinary process: own folder, own ports, loopback, nothing left behind.

Debian's package (its service is kept from starting by tools/setup). Erlang's port mapper epmd, which every node wants,
is a process of ours too, on a port of its own, and ends with the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.owned import owned

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
MARK = b"Server startup complete"


def missing() -> list[str]:
    """What is not installed."""
    return [what for what, there in (("epmd", shutil.which("epmd")), ("rabbitmq-server", SERVER.exists())) if not there]


@contextlib.contextmanager
def port_mapper(port: int) -> Iterator[None]:
    """epmd, in the foreground."""
    command = owned(["epmd", "-address", "127.0.0.1", "-port", str(port)])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def prepare(
    parent: Path, *, port: int, distribution_port: int, mapper_port: int, login: str, passcode: str
) -> dict[str, str]:
    """Write a configuration into a new folder; the environment to start SERVER with. 0600: the passcode is in it."""
    folder = Path(tempfile.mkdtemp(prefix="rabbitmq-", dir=parent))
    (folder / "enabled_plugins").write_text("[rabbitmq_stomp].\n")
    configuration = folder / "rabbitmq.conf"
    configuration.touch(0o600)
    configuration.write_text(
        "listeners.tcp = none\n"
        f"stomp.listeners.tcp.1 = 127.0.0.1:{port}\n"
        "distribution.listener.interface = 127.0.0.1\n"
        f"default_user = {login}\ndefault_pass = {passcode}\n"
        "log.file = false\nlog.console = true\nlog.console.level = info\n"
        "vm_memory_high_watermark.absolute = 1GB\n"
        "disk_free_limit.absolute = 50MB\n"
    )
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),  # for Erlang's cookie
        "LC_ALL": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(mapper_port),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_NODENAME": f"vmwrapper-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_CONFIG_FILE": str(configuration),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
        "RABBITMQ_ALLOW_INPUT": "1",  # then the script becomes the server instead of waiting for it
        # no input all the same; and schedulers that do not spin while they wait
        "RABBITMQ_SERVER_START_ARGS": "-noinput +sbwt none +sbwtdcpu none +sbwtdio none",
    }
