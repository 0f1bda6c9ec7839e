"""The link's secret over restarts of the agent: a one-time token that the host replaced stays replaced.

Owns one file (0600) in the state folder. It counts only for the token that it replaced, so a guest that is booted anew
with another token starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from guest.agent.smbios import HostSettings
from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    replaces: str
    """SHA-256 of the one-time token, hex."""
    secret: str


class SecretStore:
    """`current` is the secret that counts now, as bytes (the text's ASCII); empty: there is none."""

    def __init__(self, path: Path, settings: HostSettings) -> None:
        self._path = path
        self._token = hashlib.sha256(settings.secret.encode()).hexdigest()
        self.current = settings.secret.encode()
        if settings.once:
            self.current = self._stored() or self.current

    def replace(self, secret: bytes) -> None:
        """The host gave another secret. It counts even if it cannot be written."""
        self.current = secret
        entry = _Entry(self._token, secret.decode("latin-1"))
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(asdict(entry)).encode(), mode=0o600)
        except OSError as error:
            log.error("%s: %s; a restart of the agent will not know the host's secret", self._path, error.strerror)

    def _stored(self) -> bytes | None:
        try:
            entry = jsonfile.typed(_Entry, jsonfile.load(self._path))
            return entry.secret.encode("latin-1") if entry.replaces == self._token else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s cannot be used: %s", self._path, error)
            return None
