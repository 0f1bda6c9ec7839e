"""The HTTP service of the agent, over connections that have shown the secret.

The requests: docs/internals/transfer.md.

Twisted's own HTTP server parses and answers; this module routes requests, streams bodies from and to disk with bounded
memory, and turns every error into a status and a JSON object. It listens nowhere: LinkServer hands it connections.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.web import http

from guest.files.downloads import Downloads, OpenFile
from guest.files.emulation import digest_algorithm
from guest.files.uploads import SHA256, Refusal, Upload, Uploads, check_path, refusal_of
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import start_logged
from vmcontrol.common.filestream import CHUNK, FileSender, RunningHash
from vmcontrol.common.threads import defer_to_thread
from vmcontrol.protocol.messages import PROTOCOL

log = logging.getLogger(__name__)

IDLE_LIMIT_S = 600
"""Seconds after which a connection without a request is closed."""
SMALL_LIMIT = CHUNK
"""Bytes of a body that is taken into memory: JSON, and small files."""
QUERY_LIMIT = 64
"""Fields of a query."""
SECRET = re.compile(r"[\x21-\x7e]{16,512}\Z")
_CONTENT_RANGE = re.compile(rb"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})\Z")
_RANGE = re.compile(rb"bytes=([0-9]{1,18})-\Z")

Answer = dict[str, object]


class _Body:
    """What Twisted's Request writes a body to: memory, an upload, or nothing when the request will be refused."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._size = 0
        self.parts: list[bytes] = []
        self.upload: Upload | None = None
        self.refusal: Refusal | None = None

    def write(self, data: bytes) -> None:
        upload = self.upload
        if upload is not None and upload.source is self._transport:
            upload.receiver.write(data)
            if upload.receiver.error is not None:
                # The host hears the reason when it asks why; it need not send the rest before.
                self._transport.abortConnection()
            return
        if self.refusal is not None or upload is not None:
            return
        self._size += len(data)
        if self._size > SMALL_LIMIT:
            self.parts.clear()
            self.refusal = Refusal(413, "the body is too long for this request")
        else:
            self.parts.append(data)

    def content(self) -> bytes:
        return b"".join(self.parts)

    # What else Request does with its content

    def tell(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = 0) -> None: ...

    def close(self) -> None:
        self.parts.clear()


class AgentRequest(http.Request):
    """A request. The body goes where its headers say, while it arrives; then `process` answers."""

    def __init__(self, server: FileServer, channel: Any) -> None:
        super().__init__(channel)
        self._server = server
        self.body = _Body(channel.transport)

    def gotLength(self, length: int | None) -> None:  # noqa: N802
        self.content = self.body
        transfer = self.requestHeaders.getRawHeaders(b"Transfer-Id")
        if transfer is None:
            return
        try:
            self.body.upload = self._server.body_begins(transfer[0], self.one_header(b"Content-Range"), length, self)
        except Refusal as refusal:
            self.body.refusal = refusal

    def process(self) -> None:
        start_logged(self._server.serve(self), "a request of the host")

    def one_header(self, name: bytes) -> bytes:
        values = self.requestHeaders.getRawHeaders(name) or [b""]
        return bytes(values[0])

    def fields(self) -> dict[str, str]:
        """The query. Names of files may be any bytes: what is no UTF-8 goes through as surrogates."""
        _, _, query = bytes(self.uri).partition(b"?")
        try:
            pairs = parse_qsl(
                query.decode("ascii"),
                keep_blank_values=True,
                errors="surrogateescape",
                max_num_fields=QUERY_LIMIT,
            )
        except ValueError:
            raise Refusal(400, "bad query") from None
        return dict(pairs)


class FileServer:
    """Serves HTTP on connections that are handed to it."""

    def __init__(
        self,
        reactor: Any,
        base_folder: Path,
        *,
        secret: Any,
        set_clock: Callable[[float], Any],
        describe: Callable[[], Mapping[str, object]],
    ) -> None:
        self._reactor = reactor
        self._base = base_folder
        self._secret = secret
        self._set_clock = set_clock
        self._describe = describe
        algorithm = digest_algorithm()
        self._uploads = Uploads(reactor, base_folder, algorithm)
        self._downloads = Downloads(base_folder, algorithm)

    def protocol(self) -> Any:
        """What an authenticated connection is handed to."""
        channel: Any = http.HTTPChannel()
        channel.requestFactory = lambda channel, *_: AgentRequest(self, channel)
        channel.timeOut = IDLE_LIMIT_S
        channel.callLater = self._reactor.callLater
        return channel

    def close(self) -> None:
        """The agent ends."""
        self._uploads.close()

    def body_begins(self, transfer: bytes, content_range: bytes, length: int | None, request: AgentRequest) -> Upload:
        """The headers of a body that belongs to a transfer are there."""
        match = _CONTENT_RANGE.match(content_range)
        if match is None:
            raise Refusal(400, "Transfer-Id without a good Content-Range")
        first, last, total = (int(number) for number in match.groups())
        if last >= total or first > last or length != last - first + 1:
            raise Refusal(400, "Content-Range and Content-Length do not fit")
        return self._uploads.receive(transfer.decode("ascii", "replace"), first, total, request.transport)

    async def serve(self, request: AgentRequest) -> None:
        """Answer a request whose body is complete."""
        gone: Deferred[None] = request.notifyFinish()
        lost: list[object] = []
        gone.addErrback(lost.append)
        try:
            if request.body.refusal is not None:
                raise request.body.refusal
            fields = request.fields()
            path = unquote_to_bytes(bytes(request.path)).decode("utf-8", "replace")
            method = bytes(request.method).decode("ascii", "replace")
            if (method, path) == ("GET", "/v1/files"):
                await self._send_file(request, fields, lost)
                return
            status, answer = 200, await self._answer(method, path, request, fields)
        except Refusal as refusal:
            status, answer = refusal.status, refusal.body
        except Exception as error:
            log.exception("a request of the host failed")
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        if not lost:
            _send_json(request, status, answer)

    async def _answer(self, method: str, path: str, request: AgentRequest, fields: dict[str, str]) -> Answer:
        text = fields.get("path", "")
        match method, path.split("/")[1:]:
            case _, ["v1", "transfers", transfer, *rest]:
                answer = await self._transfer(method, transfer, rest, request.body.upload, fields)
            case "GET", ["v1", "status"]:
                answer = self._status()
            case "POST", ["v1", "clock"]:
                answer = await self._change_clock(_json_body(request))
            case "PUT", ["v1", "secret"]:
                answer = self._replace_secret(_json_body(request))
            case "GET", ["v1", "list"]:
                answer = await defer_to_thread(self._reactor, self._downloads.listing, text)
            case "PUT", ["v1", "files"]:
                answer = await self._put_small(text, request.body.content(), fields)
            case "GET", ["v1", "digest"]:
                answer = await defer_to_thread(self._reactor, self._downloads.digest, text, fields.get("etag", ""))
            case _:
                raise Refusal(404, "no such request")
        return answer

    async def _transfer(
        self, method: str, transfer: str, rest: list[str], upload: Upload | None, fields: dict[str, str]
    ) -> Answer:
        match method, rest:
            case "POST", []:
                total, mode = _number(fields, "total"), _number(fields, "mode", base=8)
                answer = await self._uploads.begin(transfer, fields.get("path", ""), total, mode)
            case "GET", []:
                answer = self._uploads.state(transfer)
            case "PUT", []:
                if upload is None:
                    raise Refusal(400, "no Transfer-Id")
                answer = await self._uploads.body_done(transfer, upload)
            case "DELETE", []:
                answer = await self._uploads.discard(transfer)
            case "POST", ["commit"]:
                answer = await self._uploads.commit(transfer, fields)
            case _:
                raise Refusal(404, "no such request")
        return answer

    # The agent itself

    def _status(self) -> Answer:
        return {
            "agent": "vmwrapper",
            "protocol": PROTOCOL,
            "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME),
            "time": time.time(),
            "base_folder": str(self._base),
            **self._describe(),
        }

    async def _change_clock(self, wanted: dict[str, Any]) -> Answer:
        seconds = wanted.get("time")
        if not isinstance(seconds, int | float) or not 0 < seconds < 2**40:
            raise Refusal(400, "no time")
        await maybeDeferred(self._set_clock, float(seconds))
        return {"time": time.time()}

    def _replace_secret(self, wanted: dict[str, Any]) -> Answer:
        secret = wanted.get("secret")
        if not isinstance(secret, str) or not SECRET.match(secret):
            raise Refusal(400, "a secret has 16 to 512 printable ASCII characters")
        self._secret.replace(secret.encode("ascii"))
        return {}

    # Files

    async def _put_small(self, text: str, content: bytes, fields: dict[str, str]) -> Answer:
        path = check_path(self._base, text)
        sha256 = fields.get("sha256", "")
        if not SHA256.match(sha256):
            raise Refusal(400, "no SHA-256")
        mode = _number(fields, "mode", base=8)

        def work() -> None:
            if hashlib.sha256(content).hexdigest() != sha256:
                raise Refusal(422, "the SHA-256 differs: bytes changed on the way")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content, mode=mode & 0o777)
            except OSError as error:
                raise refusal_of(error, text) from error

        await defer_to_thread(self._reactor, work)
        return {"path": str(path), "size": len(content), "sha256": sha256, "complete": True}

    async def _send_file(self, request: Any, fields: dict[str, str], lost: list[object]) -> None:
        opened = await defer_to_thread(self._reactor, self._downloads.open, fields.get("path", ""))
        try:
            first = _first_byte(request, opened)
            request.setHeader(b"ETag", opened.etag.encode("ascii"))
            request.setHeader(b"Content-Length", b"%d" % (opened.size - first))
            request.setHeader(b"Content-Type", b"application/octet-stream")
            request.setHeader(b"X-Digest", self._downloads.algorithm.encode("ascii"))
            if first:
                request.setResponseCode(206)
                request.setHeader(b"Content-Range", b"bytes %d-%d/%d" % (first, opened.size - 1, opened.size))
            digest = self._downloads.running_hash(opened.etag)
            if first == 0 and opened.size <= SMALL_LIMIT:
                small = RunningHash()
                await defer_to_thread(self._reactor, small.catch_up, opened.fd, opened.size)
                request.setHeader(b"X-Sha256", small.hexdigest().encode("ascii"))
            if lost:
                return
            sender = FileSender(self._reactor, opened.fd, first, opened.size, digest=digest)
            request.notifyFinish().addErrback(lambda _: sender.cancel())
            request.registerProducer(sender, True)
            try:
                await sender.start(request)
            except Exception as error:  # noqa: BLE001 (the promised length cannot be kept: the connection is the answer)
                log.warning("sending %s ended early: %s", fields.get("path"), error or type(error).__name__)
                if not lost:
                    request.unregisterProducer()
                    request.transport.abortConnection()
                return
            finally:
                await sender.when_idle()
            if not lost:
                request.unregisterProducer()
                request.finish()
        finally:
            os.close(opened.fd)


def _send_json(request: Any, status: int, answer: Answer) -> None:
    content = json.dumps(answer).encode("ascii")
    request.setResponseCode(status)
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", b"%d" % len(content))
    request.write(content)
    request.finish()


def _json_body(request: AgentRequest) -> dict[str, Any]:
    try:
        parsed = json.loads(request.body.content())
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise Refusal(400, "the body is no JSON object")
    return parsed


def _number(fields: dict[str, str], name: str, *, base: int = 10) -> int:
    text = fields.get(name, "")
    try:
        number = int(text, base) if len(text) <= 18 else -1
    except ValueError:
        number = -1
    if number < 0:
        raise Refusal(400, f"bad {name}")
    return number


def _first_byte(request: Any, opened: OpenFile) -> int:
    """Where to begin. Only `bytes=N-` is understood, and only for the file in the state that the host knows."""
    wanted = request.one_header(b"If-Match")
    if wanted and bytes(wanted).decode("ascii", "replace") != opened.etag:
        raise Refusal(412, "the file changed meanwhile")
    text = request.one_header(b"Range")
    if not text:
        return 0
    match = _RANGE.match(text)
    if match is None or (int(match[1]) >= opened.size > 0):
        raise Refusal(416, "bad range", size=opened.size)
    return int(match[1]) if opened.size else 0
