"""HostConfig.cfg and the environment, read into one value. Reads one file and opens nothing else.

The form of 2009 is valid as it is. What the file names counts; what it does not name (or leaves empty, or as port 0)
comes from the environment that the wrapper gives, else from a default. docs/reference/configuration.md has the table.
Without a file everything has its default, and the broker is embedded.

    ConfigError     file, section, option, what was expected
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from vmcontrol.common.slotfiles import SECRET

Choice = TypeVar("Choice", bound=StrEnum)

STOMP_PORT = 61613
"""The broker's port of the original, ActiveMQ's default."""
XMLRPC_PORT = 8080
"""The XML-RPC port of the original; used when HostMain is started standalone."""
SECRETS = ("VMWRAPPER_XMLRPC_SECRET", "VMWRAPPER_BROKER_PASSCODE")
"""Environment variables."""
CONFIG_LIMIT = 256 * 1024
"""Bytes; a configuration file is a page of text."""


class ConfigError(Exception):
    """What is wrong with the configuration, in one line: file, section, option, what was expected."""


class BrokerKind(StrEnum):
    """Who runs the broker."""

    EMBEDDED = "embedded"
    EXTERNAL = "external"


class FileWay(StrEnum):
    """How files go between host and guest."""

    HTTP = "http"
    CHIRP = "chirp"


class HypervisorKind(StrEnum):
    """As in HostConfig.cfg."""

    VIRTUALBOX = "VirtualBox"
    QEMU = "QEMU"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where the broker is. port 0: a free one (embedded only)."""

    kind: BrokerKind
    host: str
    port: int
    login: str
    passcode: str = field(repr=False)
    has_port: bool = True
    """False: an embedded one that only HostMain itself and the agents that it dials join."""
    named: bool = False
    """Login and passcode stand in the file: then VMConfig.cfg of a guest on the link of protocol 1 names the same."""

    @property
    def is_jobs(self) -> bool:
        """It has to be a program that the wrapper started: login and passcode are those of the run."""
        return self.kind is BrokerKind.EXTERNAL and not self.named and bool(self.passcode)


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Everything HostMain is told when it starts."""

    slot: Path
    broker: BrokerConfig
    xmlrpc_host: str
    xmlrpc_port: int
    """0: a free one."""
    xmlrpc_secret: str | None = field(repr=False)
    """None: whoever reaches the port may call."""
    vm_gc_grace_s: float
    """Seconds without a beacon after which a guest is warned about; it is dropped after 1.5 times that."""
    hypervisor: HypervisorKind
    file_way: FileWay
    chirp_path: str
    network_interface: str
    secret_file: Path
    """Secret of the link with the guest."""
    lifeline_fd: int | None
    status_fd: int | None
    door_fd: int | None
    """Socket over which the wrapper sends its connections (vmcontrol.common.door)."""
    disk_bound: int
    """Bytes that the job may take on the disk, as the wrapper was told; 0: not known."""
    standalone: bool
    """Not started by the wrapper."""
    warnings: tuple[str, ...] = ()


KNOWN: Mapping[str, frozenset[str]] = {
    "broker": frozenset({"host", "port", "username", "password", "type"}),
    "host": frozenset(
        {"chirp_path", "xmlrpc_listen_on", "xmlrpc_port", "vm_gc_grace", "network_interface", "file_transfer"}
    ),
    "hypervisor": frozenset({"hypervisor", "hypervisor_helpers_path"}),
    "coilmq": frozenset({"listen_addr"}),
}


class _Reader:
    """One parsed file; every complaint names the place."""

    def __init__(self, path: Path | None, parser: configparser.ConfigParser) -> None:
        self._place = "" if path is None else f"{path}: "
        self._sections = {name.lower(): parser[name] for name in parser.sections()}
        self.warnings: list[str] = []

    def check_names(self) -> None:
        for section, options in self._sections.items():
            if section not in KNOWN:
                self.warn(f"[{section}] is no section of HostConfig.cfg; ignored")
                continue
            for option in options:
                if option not in KNOWN[section]:
                    self.warn(f"[{section}] {option} is no option of HostConfig.cfg; ignored")
        if "coilmq" in self._sections:
            self.warn("[coilmq] is not used; HostMain's own broker is chosen by [Broker] type = embedded")

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self._place}{text}")

    def error(self, section: str, option: str, expected: str, got: str) -> ConfigError:
        return ConfigError(f"{self._place}[{section}] {option}: expected {expected}, got {got[:80]!r}")

    def text(self, section: str, option: str, default: str = "") -> str:
        options = self._sections.get(section.lower())
        value = "" if options is None else (options.get(option) or "")
        return value.strip() or default

    def port(self, section: str, option: str) -> int | None:
        text = self.text(section, option)
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
            raise self.error(section, option, "a port number (0 for a free one)", text)
        return int(text)

    def seconds(self, section: str, option: str, default: float) -> float:
        text = self.text(section, option)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= 86400:
            raise self.error(section, option, "a number of seconds from 0.1 to 86400", text)
        return value

    def choice(self, section: str, option: str, kind: type[Choice]) -> Choice | None:
        text = self.text(section, option)
        if not text:
            return None
        for member in kind:
            if member.value.lower() == text.lower():
                return member
        raise self.error(section, option, "one of " + ", ".join(m.value for m in kind), text)


def read_config(path: Path | None, environment: Mapping[str, str], folder: Path) -> HostConfig:
    """Read `path`; `folder` is the working folder, which is the slot when the environment names none.

    Without a file (None) all is as with one that says `[Broker] type = embedded` and nothing else.

    Raises ConfigError for anything that is wrong with the file or the environment.
    """
    reader = _Reader(path, _without_file() if path is None else _parse(path))
    reader.check_names()
    standalone = "VMWRAPPER_SLOT" not in environment
    slot = Path(environment.get("VMWRAPPER_SLOT") or folder).absolute()
    secret = environment.get("VMWRAPPER_XMLRPC_SECRET") or None
    host, port = _xmlrpc(reader, standalone=standalone, secret=secret)
    file_way, chirp_path = _files(reader)
    return HostConfig(
        slot=slot,
        broker=_broker(reader, environment),
        xmlrpc_host=host,
        xmlrpc_port=port,
        xmlrpc_secret=secret,
        vm_gc_grace_s=reader.seconds("Host", "vm_gc_grace", 30.0),
        hypervisor=_hypervisor(reader, environment),
        file_way=file_way,
        chirp_path=chirp_path,
        network_interface=reader.text("Host", "network_interface"),
        secret_file=Path(environment.get("VMWRAPPER_SECRET_FILE") or slot / SECRET),
        lifeline_fd=_fd(environment, "VMWRAPPER_LIFELINE_FD"),
        status_fd=_fd(environment, "VMWRAPPER_STATUS_FD"),
        door_fd=_fd(environment, "VMWRAPPER_DOOR_FD"),
        disk_bound=_bytes(environment, "VMWRAPPER_DISK_BOUND"),
        standalone=standalone,
        warnings=tuple(reader.warnings),
    )


def _bytes(environment: Mapping[str, str], name: str) -> int:
    """0: none, or none that is understood."""
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _hypervisor(reader: _Reader, environment: Mapping[str, str]) -> HypervisorKind:
    """What the configuration says, unless the job file asks for one (the wrapper passes that on)."""
    configured = reader.choice("Hypervisor", "hypervisor", HypervisorKind) or HypervisorKind.AUTO
    asked = environment.get("VMWRAPPER_HYPERVISOR", "").lower()
    return next((kind for kind in HypervisorKind if kind.value.lower() == asked), configured)


def _without_file() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_dict({"Broker": {"type": BrokerKind.EMBEDDED.value}})
    return parser


def _parse(path: Path) -> configparser.ConfigParser:
    # as Python 2 read it: a later line counts, " ;" begins a comment
    parser = configparser.ConfigParser(interpolation=None, strict=False, inline_comment_prefixes=(";",))
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_LIMIT + 1)
        if len(content) > CONFIG_LIMIT:
            raise ConfigError(f"{path}: larger than {CONFIG_LIMIT} bytes; that is no HostConfig.cfg")
        parser.read_string(content.decode("utf-8-sig"), source=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except configparser.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return parser


def _broker(reader: _Reader, environment: Mapping[str, str]) -> BrokerConfig:
    kind = reader.choice("Broker", "type", BrokerKind) or BrokerKind.EXTERNAL
    port = reader.port("Broker", "port")
    host = reader.text("Broker", "host", "localhost" if kind is BrokerKind.EXTERNAL else "127.0.0.1")
    login, passcode = reader.text("Broker", "username"), reader.text("Broker", "password")
    named = bool(login)
    if not named:
        login = environment.get("VMWRAPPER_BROKER_LOGIN", "")
        passcode = environment.get("VMWRAPPER_BROKER_PASSCODE", "")
    if kind is BrokerKind.EMBEDDED:
        if not login:  # by hand: only guests that HostMain dials learn them
            login, passcode = "vmwrapper", secrets.token_hex(16)
        host = _embedded_host(reader, host)
        has_port = bool(port) or not ipaddress.ip_address(host).is_loopback
        return BrokerConfig(kind, host, port or 0, login, passcode, has_port, named)
    if not port:
        given = environment.get("VMWRAPPER_BROKER_PORT", "")
        if given.isascii() and given.isdigit() and 0 < int(given) <= 65535:
            port = int(given)
        elif given:
            raise ConfigError(f"VMWRAPPER_BROKER_PORT: expected a port number, got {given[:80]!r}")
        elif port is None:
            port = STOMP_PORT
        else:
            raise reader.error(
                "Broker",
                "port",
                "the port of the external broker (0 needs VMWRAPPER_BROKER_PORT or type = embedded)",
                "0",
            )
    return BrokerConfig(kind, host, port, login, passcode, named=named)


def _embedded_host(reader: _Reader, host: str) -> str:
    """The embedded broker listens on loopback, or where the file says (protocol 1 over a host-only network)."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise reader.error("Broker", "host", "an address of this computer for type = embedded", host) from None
    if not address.is_loopback:
        reader.warn(f"[Broker] host = {host}: the broker can be reached from outside this computer")
    return host


def _xmlrpc(reader: _Reader, *, standalone: bool, secret: str | None) -> tuple[str, int]:
    host = reader.text("Host", "xmlrpc_listen_on", "127.0.0.1")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise reader.error("Host", "xmlrpc_listen_on", "an IP address of this computer", host) from None
    if not loopback:
        if secret is None:
            raise reader.error(
                "Host", "xmlrpc_listen_on", "127.0.0.1 (other addresses only with VMWRAPPER_XMLRPC_SECRET)", host
            )
        reader.warn(f"[Host] xmlrpc_listen_on = {host}: the control interface can be reached from outside")
    if secret is None:
        reader.warn("VMWRAPPER_XMLRPC_SECRET is not set: every user of this computer can control HostMain")
    port = reader.port("Host", "xmlrpc_port")
    if port is None:
        port = XMLRPC_PORT if standalone else 0
    return host, port


def _files(reader: _Reader) -> tuple[FileWay, str]:
    """As in the original: a chirp_path alone means Chirp."""
    chirp_path = reader.text("Host", "chirp_path")
    way = reader.choice("Host", "file_transfer", FileWay)
    return way or (FileWay.CHIRP if chirp_path else FileWay.HTTP), chirp_path


def _fd(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        fd = int(text)
        os.fstat(fd)
    except (ValueError, OSError, OverflowError) as error:
        raise ConfigError(f"{name}: expected the number of an open file, got {text[:80]!r}") from error
    return fd
