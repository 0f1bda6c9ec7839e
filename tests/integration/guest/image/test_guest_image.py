"""The image boots on all hardware that it is made for, and has inside what docs/projects/guest-image.md says."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from guest.image import build, packages, tools
from guest.image.cache import guest_image
from tests.support.image_machine import SECRET, Machine, running
from vmcontrol.hypervisors.virtualbox.forwards import free_port
from vmcontrol.protocol.handshake import HostHandshake, Mode, Outcome

CACHE = Path(__file__).parents[4] / ".cache" / "guest-image"

pytestmark = pytest.mark.qemu


def need_tools() -> None:
    try:
        tools.check_tools()
    except tools.BuildError as error:
        pytest.skip(str(error))
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is missing (Debian package qemu-system-x86)")


@pytest.fixture(scope="session")
def image() -> Path:
    need_tools()
    return guest_image(CACHE)


@pytest.fixture(scope="session")
def shell_options(tmp_path_factory: pytest.TempPathFactory) -> build.Options:
    """The image with a shell in the agent's place."""
    files = tmp_path_factory.mktemp("shell-files")
    module = files / "usr/lib/python3/dist-packages/image_shell.py"
    module.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[3] / "support" / "image_shell.py", module)
    (files / "etc/vmwrapper").mkdir(parents=True)
    (files / "etc/vmwrapper/agent").write_text("image_shell\n")
    return build.Options(files=files)


@pytest.fixture(scope="session")
def shell_image(image: Path, shell_options: build.Options) -> Path:
    del image  # the same cache: its stages are there by now
    return guest_image(CACHE, shell_options)


def dial(machine: Machine) -> socket.socket:
    """A connection in mode http, after the handshake."""
    connection = machine.connect()
    handshake = HostHandshake(SECRET.encode(), Mode.HTTP)
    connection.sendall(handshake.opening)
    while handshake.outcome is None:
        data = connection.recv(4096)
        assert data, "the agent hung up during the handshake"
        if answer := handshake.receive(data).send:
            connection.sendall(answer)
    assert handshake.outcome is Outcome.OPEN
    return connection


def request(
    connection: socket.socket, method: str, path: str, body: dict[str, object] | None = None
) -> dict[str, object]:
    client = http.client.HTTPConnection("guest")
    client.sock = connection
    client.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    answer = client.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    found = json.loads(content)
    assert isinstance(found, dict)
    return found


def test_the_agent_answers_with_the_secret_of_smbios_and_its_clock_can_be_set(image: Path, tmp_path: Path) -> None:
    with running(image, tmp_path) as machine:
        machine.wait_for(r"agent: .*listening")
        connection = dial(machine)
        assert "agent" in request(connection, "GET", "/v1/status")
        wanted = time.time() + 86_400.25  # guests are behind after a pause; nobody has to go back
        request(connection, "POST", "/v1/clock", {"time": wanted})
        asked = time.monotonic()
        shown = request(connection, "GET", "/v1/status")["time"]
        assert isinstance(shown, float)
        assert abs(shown - wanted) < 1.0 + (time.monotonic() - asked)


def test_the_image_is_small_and_says_what_is_in_it(image: Path) -> None:
    assert image.stat().st_size < 60e6
    manifest = json.loads(image.with_name(image.name + ".json").read_bytes())
    assert manifest["debian"]["busybox-static"]
    assert manifest["kernel"] in manifest["debian"]
    assert any(name.startswith("twisted-") for name in manifest["python"])


def test_the_system_is_read_only_and_eight_gigabytes_may_be_written(shell_image: Path, tmp_path: Path) -> None:
    # The second network card is the granted network, which alone has a way out.
    granted = ("-netdev", "user,id=granted,net=10.0.3.0/24", "-device", "virtio-net-pci,netdev=granted,romfile=")
    with running(shell_image, tmp_path, more=granted) as machine:
        machine.wait_for("agent: shell is there")
        shell = machine.shell
        assert shell("id -un; id -gn; pwd; echo $HOME")[1].split() == ["vm", "vm", "/home/vm", "/home/vm"]
        for place in ("/usr/x", "/etc/x", "/bin/sh"):
            status, text = shell(f"touch {place}")
            assert status
            assert "Read-only" in text or "Permission denied" in text
        assert shell("grep ' / ' /proc/mounts")[1].split()[3].split(",")[0] == "ro"
        for place in ("/home/vm", "/tmp", "/var/tmp"):
            assert shell(f"echo text >{place}/x && cat {place}/x") == (0, "text\n")
        free_kib = int(shell("df -Pk /home/vm | tail -n 1")[1].split()[3])
        assert free_kib * 1024 >= 8e9
        assert shell("python3 -c 'import ssl, json, twisted, netifaces; print(6 * 7)'") == (0, "42\n")
        assert shell("python --version")[1].startswith("Python 3.11")
        assert shell("for p in env sh tar gzip awk sed find; do command -v $p || exit 1; done")[0] == 0
        assert SECRET in shell("strings /run/vmwrapper/secret")[1]
        assert shell("cat /proc/self/oom_score_adj")[1].strip() == "-900"
        assert "[mptspi]" in shell("modprobe -D mptspi | sed 's/.*\\(mptspi\\).*/[\\1]/'")[1]  # VirtualBox's LsiLogic
        shell("echo nonsense >/run/vmwrapper/clock; echo 'SET 1700000000.5' >/run/vmwrapper/clock")
        assert 1_700_000_000 <= float(shell("sleep 0.2; date +%s")[1]) <= 1_700_000_030
        machine.wait_for("eth1 has 10.0.3.15, router 10.0.3.2")
        assert shell("ip route")[1].splitlines()[0].startswith("default via 10.0.3.2 dev eth1")
        assert "nameserver 10.0.3.3" in shell("cat /etc/resolv.conf")[1]


def test_with_three_cards_the_agents_is_the_third(shell_image: Path, tmp_path: Path) -> None:
    """VirtualBox, the layout of 2009 with a granted network: NAT, host-only, the way to the agent."""
    port = free_port()
    more: list[str] = []
    for name, settings in (
        ("only", "net=192.168.56.0/24"),
        ("third", f"net=10.0.4.0/24,hostfwd=tcp:127.0.0.1:{port}-:4616"),
    ):
        more += (
            "-netdev",
            f"user,id={name},restrict=on,{settings}",
            "-device",
            f"virtio-net-pci,netdev={name},romfile=",
        )
    with running(shell_image, tmp_path, more=tuple(more)) as machine:
        machine.wait_for("agent: shell is there")
        machine.port = port
        assert "10.0.4.15/24" in machine.shell("ip addr show eth2")[1]
        machine.wait_for("eth0 has 10.0.2.15")
        machine.wait_for("eth1 has 192.168.56.15")
        assert "dev eth2" not in machine.shell("ip route | grep default")[1]


def test_a_dead_agent_is_started_again_and_the_power_button_works(shell_image: Path, tmp_path: Path) -> None:
    with running(shell_image, tmp_path, more=("-monitor", f"unix:{tmp_path / 'mon'},server=on,wait=off")) as machine:
        machine.wait_for("agent: shell is there")
        assert "default" not in machine.shell("ip route")[1]
        with machine.connect() as connection:
            connection.sendall(b"kill -KILL $PPID\n")
        machine.wait_for("agent: ended with status 137")
        machine.wait_for("(?s)ended with status 137.*agent: shell is there")
        assert machine.shell("echo again") == (0, "again\n")
        # The kernel must have the button's driver before it is pressed: the guest loads it beside the agent.
        assert machine.shell("until grep -q '^evdev .* 1 ' /proc/modules; do sleep 0.1; done")[0] == 0
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(tmp_path / "mon"))
            monitor.sendall(b"system_powerdown\n")
            machine.wait_for("init: power off")
            assert machine.process.wait(timeout=30) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disk", "nic", "machine"),
    [
        ("ahci", "e1000", "q35"),
        ("ide", "pcnet", "pc"),
        ("virtio-scsi", "e1000e", "q35"),
        ("mptsas", "virtio-net-pci", "pc"),
        ("lsi53c895a", "e1000", "pc"),
    ],
)
def test_it_boots_from_any_disk_with_any_network_card(
    shell_image: Path, tmp_path: Path, disk: str, nic: str, machine: str
) -> None:
    with running(shell_image, tmp_path, disk=disk, nic=nic, machine=machine) as guest:
        guest.wait_for("agent: shell is there")
        assert guest.shell("echo text >/home/vm/x && sync && cat /home/vm/x") == (0, "text\n")


@pytest.mark.slow
def test_another_user_in_another_place_builds_the_same_bytes(image: Path) -> None:
    """Without root rights, from a copy of the sources. Downloads are linked, not repeated; every stage is made anew."""
    place = Path(tempfile.mkdtemp(prefix="another and longer place "))  # pytest's own folders are closed to others
    python = next(path for path in ("/usr/bin/python3", sys.executable) if Path(path).exists())
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    try:
        for package in ("guest", "vmcontrol"):
            source = Path(__file__).parents[4] / package
            shutil.copytree(source, place / "sources" / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(CACHE / "downloads", place / "cache/downloads", copy_function=build.link_or_copy)
        shutil.copy(image.with_name(image.name + ".json"), place / "pins.json")
        for folder in (place, place / "cache", *(place / "cache").rglob("*/")):
            folder.chmod(0o755)
            if as_user:
                os.chown(folder, 65534, 65534)
        done = subprocess.run(
            [*as_user, python, "-m", "guest.image.build", "again.vdi", "--cache", "cache", "--pins", "pins.json"],
            cwd=place,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(place / "sources")},
            stderr=subprocess.PIPE,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        built = place / "again.vdi"
        assert built.read_bytes() == image.read_bytes()
        assert built.stat().st_uid == (65534 if as_user else os.geteuid())
    finally:
        shutil.rmtree(place)


@pytest.mark.slow
def test_what_a_project_adds_is_there(image: Path, shell_options: build.Options, tmp_path: Path) -> None:
    options = dataclasses.replace(
        shell_options, packages=("jq",), python_packages=("sortedcontainers",), modules=("dummy",), data_mib=9000
    )
    try:
        own = guest_image(CACHE, options)
    except packages.PackageError as error:
        pytest.skip(f"the packages that it adds cannot be had: {error}")
    manifest = json.loads(own.with_name(own.name + ".json").read_bytes())
    assert {"jq", "libjq1", "libonig5"} <= set(manifest["debian"])  # with what it depends on
    with running(own, tmp_path) as machine:
        machine.wait_for("agent: shell is there")
        assert machine.shell("""echo '{"a": [1, 2]}' | jq -c .a""") == (0, "[1,2]\n")
        assert machine.shell("python3 -c 'from sortedcontainers import SortedList as s; print(s([2, 1])[0])'") == (
            0,
            "1\n",
        )
        assert "dummy" in machine.shell("modprobe -D dummy")[1]
        assert int(machine.shell("df -Pk /home/vm | tail -n 1")[1].split()[1]) > 8600 * 1024


def test_whoever_asks_while_another_builds_gets_the_same_image(image: Path) -> None:
    found: list[Path] = []
    with build.locked(CACHE):
        asking = [threading.Thread(target=lambda: found.append(guest_image(CACHE))) for _ in range(2)]
        for thread in asking:
            thread.start()
        assert not found
    for thread in asking:
        thread.join(30)
    assert found == [image, image]
