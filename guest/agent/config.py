"""VMConfig.cfg, the agent's configuration. Owns the meaning of its options; never touches the network or the guest.

The original form is valid as it is. Every option, its default and what it means: docs/reference/configuration.md.

    ConfigError     the file cannot be used; `str` names file, section, option and what was expected
"""

from __future__ import annotations

import configparser
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.protocol.handshake import AGENT_PORT, GUEST_STOMP_PORT

log = logging.getLogger(__name__)

STATE_FOLDER = ".vmwrapper"
"""Folder of the agent's own files (outputs of commands, journal) inside the base folder."""

SIZE_LIMIT = 64 * 1024
"""Bytes of a VMConfig.cfg that are read; the original's has ten lines."""

CHIRP_PORT = 9094
"""Chirp's own default, and the original's."""
HOSTS = ("10.0.2.2", "192.168.56.1")
"""Where connections of the host come from: VirtualBox's NAT and QEMU's user network; a host-only network."""

_KNOWN = {
    "broker": {"host", "port", "username", "password"},
    "vm": {
        "network_interface",
        "beacon_interval",
        "dir_to_serve",
        "listen_on",
        "listen_port",
        "stomp_port",
        "secret_file",
        "clock_helper",
        "journal",
        "chirp_server",
        "chirp_port",
        "chirp_hosts",
        "log_level",
    },
}


class ConfigError(Exception):
    """VMConfig.cfg cannot be used; `str` is the whole sentence."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the agent dials on the link of protocol 1, and as whom."""

    host: str
    port: int
    username: str
    password: str


@dataclass(frozen=True, slots=True)
class Config:
    """VMConfig.cfg as read."""

    broker: BrokerAddress | None
    """None: the default link, the host dials the guest."""
    network_interface: str
    """Empty: not named here."""
    beacon_interval_s: float
    base_folder: Path
    listen_on: str
    listen_port: int
    stomp_port: int
    secret_file: Path | None
    clock_helper: Path
    journal: Path
    chirp_server: str
    """Program; empty: looked for, "none": off."""
    chirp_port: int
    chirp_hosts: tuple[str, ...]
    """Names or addresses."""
    log_level: str

    @property
    def state_folder(self) -> Path:
        return self.base_folder / STATE_FOLDER


def load(path: Path) -> Config:
    """Read `path`. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > SIZE_LIMIT:
        raise ConfigError(f"{path}: larger than {SIZE_LIMIT // 1024} KiB; this is no VMConfig.cfg")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return parse(text, str(path))


def parse(text: str, name: str = "VMConfig.cfg") -> Config:
    """The configuration in `text`; `name` is the file's name for messages. Raises ConfigError."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(text, name)
    except configparser.Error as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    sections = {section.lower(): parser[section] for section in parser.sections()}
    for section, options in sections.items():
        known = _KNOWN.get(section)
        if known is None:
            log.warning("%s: section [%s] is not known and ignored", name, options.name)
            continue
        for option in options:
            if option not in known:
                log.warning("%s: [%s] %s is not known and ignored", name, options.name, option)
    return _Reader(name, sections).config()


class _Reader:
    """Options with their types and bounds; every complaint names file, section and option."""

    def __init__(self, name: str, sections: dict[str, configparser.SectionProxy]) -> None:
        self._name = name
        self._sections = sections

    def config(self) -> Config:
        host = self._text("broker", "host")
        broker = None
        if host:
            broker = BrokerAddress(
                host,
                self._port("broker", "port", 61613),
                self._text("broker", "username"),
                self._text("broker", "password"),
            )
        base = self._path("vm", "dir_to_serve") or Path.home()
        if not base.is_dir():
            raise self._error("vm", "dir_to_serve", f"{base} is no folder")
        level = self._text("vm", "log_level").upper() or "INFO"
        if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise self._error("vm", "log_level", f"{level!r} is none of DEBUG, INFO, WARNING, ERROR")
        return Config(
            broker=broker,
            network_interface=self._text("vm", "network_interface"),
            beacon_interval_s=self._seconds("vm", "beacon_interval", 10.0),
            base_folder=base,
            listen_on=self._text("vm", "listen_on") or "0.0.0.0",  # noqa: S104 (the guest's port; a secret guards it)
            listen_port=self._port("vm", "listen_port", AGENT_PORT),
            stomp_port=self._port("vm", "stomp_port", GUEST_STOMP_PORT),
            secret_file=self._path("vm", "secret_file"),
            clock_helper=self._path("vm", "clock_helper") or Path("/run/vmwrapper/clock"),
            journal=self._path("vm", "journal") or base / STATE_FOLDER / "journal.json",
            chirp_server=self._text("vm", "chirp_server"),
            chirp_port=self._port("vm", "chirp_port", CHIRP_PORT),
            chirp_hosts=tuple(self._text("vm", "chirp_hosts").split()) or ((host,) if host else HOSTS),
            log_level=level,
        )

    def _error(self, section: str, option: str, what: str) -> ConfigError:
        return ConfigError(f"{self._name}: [{'VM' if section == 'vm' else 'Broker'}] {option}: {what}")

    def _text(self, section: str, option: str) -> str:
        options = self._sections.get(section)
        text = "" if options is None else (options.get(option) or "").strip()
        if "\n" in text:
            raise self._error(section, option, "has more than one line")
        return text

    def _path(self, section: str, option: str) -> Path | None:
        text = self._text(section, option)
        if "\0" in text:
            raise self._error(section, option, "has a NUL character")
        # not Path.resolve: a link as base folder is its owner's wish. A ~ that means nobody stays as it is.
        return Path(os.path.abspath(os.path.expanduser(text))) if text else None  # noqa: PTH100, PTH111

    def _port(self, section: str, option: str, default: int) -> int:
        text = self._text(section, option)
        if not text:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
            raise self._error(section, option, f"{text!r} is no port (1 to 65535)")
        return int(text)

    def _seconds(self, section: str, option: str, default: float) -> float:
        text = self._text(section, option)
        if not text:
            return default
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0.1 <= seconds <= 3600:
            raise self._error(section, option, f"{text!r} is no time in seconds (0.1 to 3600)")
        return seconds
