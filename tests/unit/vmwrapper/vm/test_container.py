"""vmwrapper.vm.container: what runs in a container, as Docker would have it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.api.arguments import command_request
from vmcontrol.common.containerdisk import ContainerConfig, ContainerDisk
from vmcontrol.protocol.container import ContainerRun
from vmcontrol.protocol.vm import VmSettings
from vmwrapper.job.model import GuestOptions, Task
from vmwrapper.vm import container
from vmwrapper.vm.container import DEFAULT_PATH, BadContainer

DISK = ContainerDisk("ab" * 32, "myapp:1.0")


def task(application: str = "", command_line: str = "", **guest: object) -> Task:
    options = replace(GuestOptions("vm", container="app.vdi"), **guest)  # type: ignore[arg-type]
    return Task(application, 3, command_line, guest=options)


@pytest.mark.parametrize(
    ("application", "command_line", "entrypoint", "cmd", "expected"),
    [
        ("", "", ("python",), ("main.py",), "python main.py"),
        ("", "", (), ("run", "all"), "run all"),
        ("", "", ("run",), (), "run"),
        ("", "other.py 5", ("python",), ("main.py",), "python other.py 5"),
        ("", "sh -c x", (), ("run",), "sh -c x"),
        ("tool", "", ("python",), ("main.py",), "tool"),
        ("tool", "5", ("python",), ("main.py",), "tool 5"),
        ("tool", "", (), (), "tool"),
    ],
)
def test_what_runs(
    application: str, command_line: str, entrypoint: tuple[str, ...], cmd: tuple[str, ...], expected: str
) -> None:
    config = ContainerConfig(entrypoint, cmd)
    assert " ".join(container.argv(task(application, command_line), config)) == expected
    assert " ".join(container.argv(task(application, command_line), config, ["-v", "x"])) == f"{expected} -v x"


def test_an_application_that_is_copied_is_one_of_the_working_folder() -> None:
    assert container.argv(task("bin/tool", copy_app_to_vm=True), ContainerConfig()) == ("./bin/tool",)
    assert container.argv(task("tool", app_path_vm="/opt"), ContainerConfig()) == ("/opt/tool",)


@pytest.mark.parametrize("further", [[], ["x"]])
@pytest.mark.parametrize("config", [ContainerConfig(), ContainerConfig(("",), ("x",))])
def test_nothing_to_run_is_told(config: ContainerConfig, further: list[str]) -> None:
    with pytest.raises(BadContainer, match="nothing to run"):
        container.argv(task(), config, further)


def test_the_variables() -> None:
    assert container.environment((), {}) == {"PATH": DEFAULT_PATH}
    assert container.environment(("PATH=/x", "A=1=2", "odd", "=bad"), {}) == {"PATH": "/x", "A": "1=2"}
    assert container.environment(("A=1", "B=2"), {"A": "3", "PATH": "/p"}) == {"PATH": "/p", "A": "3", "B": "2"}


@pytest.mark.parametrize(
    ("image", "own", "expected"),
    [
        ("", "", "/app"), ("/", "", "/app"), ("//", "", "/app"), ("/srv", "", "/srv"), ("srv/x/", "", "/srv/x"),
        ("/a/../b//c/.", "", "/b/c"), ("/..", "", "/app"), ("/srv", "/data", "/data"),
    ],
)  # fmt: skip
def test_the_working_folder(image: str, own: str, expected: str) -> None:
    assert container.workdir(ContainerConfig(workdir=image), own) == expected


def test_a_working_folder_of_the_system_is_told() -> None:
    with pytest.raises(BadContainer, match="container_workdir"):
        container.workdir(ContainerConfig(workdir="/proc/1"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 15), ("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGKILL", 9), ("SIGUSR1", 10), ("SIGQUIT", 3),
        ("SIGWINCH", 28), ("SIGSYS", 31), ("SIGRTMIN", 34), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("64", 64),
    ],
)  # fmt: skip
def test_the_stop_signal(text: str, number: int) -> None:
    assert container.stop_signal(text) == number


@pytest.mark.parametrize("text", ["0", "65", "-1", "SIGNOPE", "SIG", "SIGRTMIN-1", "RTMAX+1", "RTMIN+31", "٣", "1 2"])
def test_an_unknown_stop_signal_is_told(text: str) -> None:
    if text == "SIG":
        assert container.stop_signal(text) == 15
        return
    with pytest.raises(BadContainer, match="no signal"):
        container.stop_signal(text)


def test_a_user_that_the_image_does_not_have_is_told() -> None:
    config = ContainerConfig(("x",), user="nobody2", uid=None, gid=None)
    with pytest.raises(BadContainer, match="USER 'nobody2' does not exist"):
        container.command(task(), replace(DISK, config=config))


def test_the_whole_command() -> None:
    config = ContainerConfig(("python",), ("m.py",), ("A=1",), "/srv", "app", 7, 8, (9,), "SIGINT")
    made = container.command(task(settings=VmSettings(network=True)), replace(DISK, config=config), ["-x"])
    assert made.argv == ("python", "m.py", "-x")
    assert made.run == ContainerRun("ab" * 32, "/srv", 7, 8, (9,), 2, True)
    read = command_request({"id": "c", **made.to_struct()}, "request")
    assert (read.command, read.arguments, read.container) == ("python", ("m.py", "-x"), made.run)
    assert read.environment == {"A": "1", "PATH": DEFAULT_PATH}


_TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), max_size=4)


@given(_TEXTS, _TEXTS, _TEXTS, st.text(max_size=20), st.text(max_size=9), _TEXTS)
def test_any_image_is_run_or_told(
    entrypoint: list[str], cmd: list[str], env: list[str], workdir: str, stop: str, further: list[str]
) -> None:
    config = ContainerConfig(tuple(entrypoint), tuple(cmd), tuple(env), workdir, stop_signal=stop)
    try:
        made = container.command(task(), replace(DISK, config=config), further)
    except BadContainer as error:
        assert str(error)  # noqa: PT017
        return
    assert made.argv == (*entrypoint, *cmd, *further)
    assert "PATH" in made.environment
    assert command_request({"id": "c", **made.to_struct()}, "request").container == made.run
