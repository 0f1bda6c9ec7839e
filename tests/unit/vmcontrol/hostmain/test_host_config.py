"""HostConfig.cfg: the original's form as it is, new options, the environment, one clear error for what is wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.hostmain.config import (
    BrokerKind,
    ConfigError,
    FileWay,
    HostConfig,
    HypervisorKind,
    read_config,
)

ORIGINAL = """\
[Broker]
host = localhost
port = 61613
username =
password =
[Host]
chirp_path = ./cctools-2_5_2-i686-linux-2.6/bin
xmlrpc_listen_on = 127.0.0.1
xmlrpc_port = 8080
vm_gc_grace = 30
network_interface = vboxnet0
[Hypervisor]
hypervisor = VirtualBox
hypervisor_helpers_path =
[coilmq]
listen_addr = 0.0.0.0
"""
WRAPPER = {
    "VMWRAPPER_SLOT": "/slots/3",
    "VMWRAPPER_BROKER_PORT": "40001",
    "VMWRAPPER_BROKER_LOGIN": "run",
    "VMWRAPPER_BROKER_PASSCODE": "its secret",
    "VMWRAPPER_XMLRPC_SECRET": "another secret",
    "VMWRAPPER_SECRET_FILE": "/slots/3/vmwrapper_secret",
}


def read(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> HostConfig:
    path = tmp_path / "HostConfig.cfg"
    path.write_text(text)
    return read_config(path, environment or {}, tmp_path)


def test_the_file_of_2009_started_by_hand(tmp_path: Path) -> None:
    config = read(tmp_path, ORIGINAL)
    assert config.standalone
    assert config.slot == tmp_path
    assert (config.xmlrpc_host, config.xmlrpc_port, config.xmlrpc_secret) == ("127.0.0.1", 8080, None)
    assert (config.broker.kind, config.broker.host, config.broker.port) == (BrokerKind.EXTERNAL, "localhost", 61613)
    assert (config.broker.login, config.broker.passcode) == ("", "")
    assert config.vm_gc_grace_s == 30
    assert config.hypervisor is HypervisorKind.VIRTUALBOX
    assert config.network_interface == "vboxnet0"
    assert (config.file_way, config.chirp_path) == (FileWay.CHIRP, "./cctools-2_5_2-i686-linux-2.6/bin")
    assert any("VMWRAPPER_XMLRPC_SECRET" in w for w in config.warnings)
    assert any("coilmq" in w for w in config.warnings)


def test_files_go_by_http_unless_chirp_is_asked_for(tmp_path: Path) -> None:
    assert read(tmp_path, "").file_way is FileWay.HTTP
    assert read(tmp_path, "[Host]\nfile_transfer = chirp\n").file_way is FileWay.CHIRP
    assert read(tmp_path, "[Host]\nfile_transfer = http\nchirp_path = /usr/bin\n").file_way is FileWay.HTTP


def test_what_the_file_names_counts_and_the_environment_fills_the_rest(tmp_path: Path) -> None:
    config = read(tmp_path, ORIGINAL.replace("xmlrpc_port = 8080", "xmlrpc_port = 0"), WRAPPER)
    assert not config.standalone
    assert config.slot == Path("/slots/3")
    assert config.broker.port == 61613
    assert (config.broker.login, config.broker.passcode, config.broker.named) == ("run", "its secret", False)
    assert config.xmlrpc_port == 0
    assert config.xmlrpc_secret == "another secret"
    assert config.secret_file == Path("/slots/3/vmwrapper_secret")
    named = read(tmp_path, "[Broker]\nusername=boinc\npassword=p;w%s # 1\n", WRAPPER)
    assert (named.broker.login, named.broker.passcode, named.broker.named) == ("boinc", "p;w%s # 1", True)


def test_an_external_broker_on_port_0_is_where_the_wrapper_put_it(tmp_path: Path) -> None:
    assert read(tmp_path, "[Broker]\nport=0\n", WRAPPER).broker.port == 40001
    with pytest.raises(ConfigError, match=r"HostConfig\.cfg: \[Broker\] port: .*VMWRAPPER_BROKER_PORT"):
        read(tmp_path, "[Broker]\nport=0\n")
    with pytest.raises(ConfigError, match="VMWRAPPER_BROKER_PORT"):
        read(tmp_path, "[Broker]\nport=0\n", {"VMWRAPPER_BROKER_PORT": "many"})


def test_an_empty_file_is_enough(tmp_path: Path) -> None:
    standalone = read(tmp_path, "")
    assert (standalone.broker.port, standalone.xmlrpc_port) == (61613, 8080)
    assert standalone.hypervisor is HypervisorKind.AUTO
    assert read(tmp_path, "", WRAPPER).xmlrpc_port == 0


def test_the_embedded_broker(tmp_path: Path) -> None:
    config = read(tmp_path, "[Broker]\ntype = Embedded\nhost = localhost\nport = 0\n")
    assert (config.broker.kind, config.broker.host, config.broker.port) == (BrokerKind.EMBEDDED, "127.0.0.1", 0)
    assert config.broker.login
    assert len(config.broker.passcode) >= 32
    assert config.broker.passcode != read(tmp_path, "[Broker]\ntype=embedded\n").broker.passcode
    assert config.broker.passcode not in repr(config)
    wide = read(tmp_path, "[Broker]\ntype=embedded\nhost=0.0.0.0\nusername=u\npassword=p\n")
    assert wide.broker.host == "0.0.0.0"
    assert any("outside" in w for w in wide.warnings)


def test_an_embedded_broker_has_a_port_only_where_others_are_told_one(tmp_path: Path) -> None:
    for options, has_port in (("", False), ("port = 0\n", False), ("host = localhost\nport = 0\n", False),
                              ("port = 61613\n", True), ("host = 192.168.56.1\n", True)):  # fmt: skip
        assert read(tmp_path, f"[Broker]\ntype = embedded\n{options}").broker.has_port is has_port
    assert read(tmp_path, "").broker.has_port


def test_a_broker_is_the_jobs_when_only_the_run_knows_its_passcode(tmp_path: Path) -> None:
    assert read(tmp_path, "[Broker]\nport = 61613\n", WRAPPER).broker.is_jobs
    assert not read(tmp_path, "[Broker]\nusername = u\npassword = p\n", WRAPPER).broker.is_jobs
    assert not read(tmp_path, "").broker.is_jobs, "nothing is shown to it"
    assert not read(tmp_path, "[Broker]\ntype = embedded\n", WRAPPER).broker.is_jobs


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[Broker]\nport = x\n", r"\[Broker\] port"),
        ("[Broker]\nport = 65536\n", r"\[Broker\] port"),
        ("[Broker]\nport = -1\n", r"\[Broker\] port"),
        ("[Broker]\ntype = rabbit\n", r"\[Broker\] type: expected one of embedded, external"),
        ("[Broker]\ntype = embedded\nhost = example.org\n", r"\[Broker\] host"),
        ("[Host]\nvm_gc_grace = soon\n", r"\[Host\] vm_gc_grace"),
        ("[Host]\nvm_gc_grace = nan\n", r"\[Host\] vm_gc_grace"),
        ("[Host]\nfile_transfer = ftp\n", r"\[Host\] file_transfer: expected one of http, chirp"),
        ("[Host]\nxmlrpc_listen_on = everywhere\n", r"\[Host\] xmlrpc_listen_on"),
        ("[Host]\nxmlrpc_listen_on = 0.0.0.0\n", r"\[Host\] xmlrpc_listen_on.*VMWRAPPER_XMLRPC_SECRET"),
        ("[Hypervisor]\nhypervisor = VMware\n", r"\[Hypervisor\] hypervisor: expected one of VirtualBox, QEMU, auto"),
        ("hypervisor = QEMU\n", "no section headers"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ConfigError, match=place) as error:
        read(tmp_path, text)
    assert "HostConfig.cfg" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.cfg", {}, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path, {}, tmp_path)


def test_unknown_names_are_warned_about(tmp_path: Path) -> None:
    config = read(tmp_path, "[Host]\nxmlrpc_prot = 1\n[Chirp]\nx = y\n")
    assert any("xmlrpc_prot" in w for w in config.warnings)
    assert any("[chirp]" in w for w in config.warnings)


def test_a_job_that_asks_for_a_hypervisor_is_heard_first(tmp_path: Path) -> None:
    assert read(tmp_path, ORIGINAL, {"VMWRAPPER_HYPERVISOR": "qemu"}).hypervisor is HypervisorKind.QEMU
    assert read(tmp_path, ORIGINAL, {"VMWRAPPER_HYPERVISOR": ""}).hypervisor is HypervisorKind.VIRTUALBOX


def test_file_descriptors_must_be_open_ones(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    config = read(tmp_path, "", {"VMWRAPPER_LIFELINE_FD": str(reading), "VMWRAPPER_STATUS_FD": str(writing)})
    assert (config.lifeline_fd, config.status_fd) == (reading, writing)
    os.close(reading)
    os.close(writing)
    for bad in (str(reading), "-1", "x", "9" * 30):
        with pytest.raises(ConfigError, match="VMWRAPPER_LIFELINE_FD"):
            read(tmp_path, "", {"VMWRAPPER_LIFELINE_FD": bad})


@given(content=st.binary(max_size=400) | st.text(max_size=200).map(lambda t: ("[Broker]\n" + t).encode()))
def test_anything_else_is_a_config_error_or_a_config(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    logging.disable(logging.CRITICAL)
    path = tmp_path_factory.getbasetemp() / "fuzz.cfg"
    path.write_bytes(content)
    try:
        read_config(path, {}, path.parent)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        logging.disable(logging.NOTSET)


def test_without_a_file_the_broker_is_embedded_and_the_rest_as_with_an_empty_file(tmp_path: Path) -> None:
    environment = {"VMWRAPPER_SLOT": str(tmp_path), "VMWRAPPER_XMLRPC_SECRET": "s", "VMWRAPPER_BROKER_LOGIN": "l"}
    file = tmp_path / "HostConfig.cfg"
    file.write_text("[Broker]\ntype = embedded\n")
    without = read_config(None, environment, tmp_path)
    assert without == read_config(file, environment, tmp_path)
    assert without.broker.kind is BrokerKind.EMBEDDED
    assert without.warnings == ()
