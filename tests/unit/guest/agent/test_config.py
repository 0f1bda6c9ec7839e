"""VMConfig.cfg: the original form is valid, mistakes are named, arbitrary text gives a configuration or that error."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.agent import config
from guest.agent.config import BrokerAddress, ConfigError

ORIGINAL = """[Broker]
host=192.168.56.1
port=61613
username=
password=
[VM]
network_interface=eth1
beacon_interval=10
dir_to_serve=~
"""


def test_the_original_form_is_valid(caplog: pytest.LogCaptureFixture) -> None:
    read = config.parse(ORIGINAL)
    assert read.broker == BrokerAddress("192.168.56.1", 61613, "", "")
    assert read.network_interface == "eth1"
    assert read.beacon_interval_s == 10
    assert read.base_folder == Path.home()
    assert read.journal == Path.home() / ".vmwrapper" / "journal.json"
    assert not caplog.records


@pytest.mark.parametrize("text", ["", "[VM]\n", "[Broker]\nhost =\nport = 61613\n"])
def test_without_a_broker_the_host_dials(text: str) -> None:
    read = config.parse(text)
    assert read.broker is None
    assert (read.listen_port, read.stomp_port, read.beacon_interval_s) == (4616, 61613, 10)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[Broker]\nhost=h\nport=http\n", "[Broker] port"),
        ("[Broker]\nhost=h\nport=0\n", "[Broker] port"),
        ("[Broker]\nhost=h\nport=99999\n", "[Broker] port"),
        ("[VM]\nbeacon_interval=soon\n", "[VM] beacon_interval"),
        ("[VM]\nbeacon_interval=0\n", "[VM] beacon_interval"),
        ("[VM]\nbeacon_interval=nan\n", "[VM] beacon_interval"),
        ("[VM]\ndir_to_serve=/no/such/folder\n", "[VM] dir_to_serve"),
        ("[VM]\nlog_level=loud\n", "[VM] log_level"),
        ("beacon_interval=1\n", "VMConfig.cfg"),
        ("[VM]\n[VM]\n", "VMConfig.cfg"),
    ],
)
def test_mistakes_are_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    assert named in str(caught.value)
    assert "VMConfig.cfg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config.parse("[VM]\nnetwork_interfaces=eth0\n[Host]\nx=1\n")
    assert "network_interfaces" in caplog.text
    assert "[Host]" in caplog.text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "VMConfig.cfg")


def test_a_percent_sign_in_a_password_is_just_that() -> None:
    read = config.parse("[Broker]\nhost=h\npassword=50%(x)s\n")
    assert read.broker is not None
    assert read.broker.password == "50%(x)s"


_line = st.one_of(
    st.text(max_size=30),
    st.sampled_from(ORIGINAL.splitlines()),
    st.builds(
        "{}={}".format, st.sampled_from(["port", "host", "beacon_interval", "dir_to_serve"]), st.text(max_size=20)
    ),
)


@given(st.lists(_line, max_size=12).map("\n".join))
def test_arbitrary_text_gives_a_configuration_or_the_documented_error(text: str) -> None:
    try:
        read = config.parse(text)
    except ConfigError:
        return
    assert read.broker is None or 1 <= read.broker.port <= 65535


@settings(deadline=None)  # it writes files
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_configuration_or_the_documented_error(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(ConfigError):
            config.load(Path(file.name))


def test_chirp_serves_the_hosts_addresses_alone(tmp_path: Path) -> None:
    old = config.parse(f"[Broker]\nhost = 192.168.56.1\n[VM]\ndir_to_serve = {tmp_path}\n")
    assert (old.chirp_server, old.chirp_port, old.chirp_hosts) == ("", 9094, ("192.168.56.1",))
    assert config.parse(f"[VM]\ndir_to_serve = {tmp_path}\n").chirp_hosts == ("10.0.2.2", "192.168.56.1")
    new = config.parse(
        f"[VM]\ndir_to_serve = {tmp_path}\nchirp_server = none\nchirp_port = 9\nchirp_hosts = a 10.0.0.1\n"
    )
    assert (new.chirp_server, new.chirp_port, new.chirp_hosts) == ("none", 9, ("a", "10.0.0.1"))
