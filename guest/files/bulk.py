"""How the contents of files get from requests of the agent's HTTP service into files, and from files into answers.

Small ones go through Twisted; for large ones guest.pump borrows the connection, and the HTTP parser is only told how
much has passed. Owns nothing: requests, uploads and open files are its callers'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from guest.files.pump import BUFFER, ReceivingPump, SendingPump, stand_in
from vmcontrol.common.eventloop import sleep
from vmcontrol.common.filestream import FileSender, RunningHash

if TYPE_CHECKING:
    from guest.files.downloads import OpenFile
    from guest.files.uploads import Upload

PUMP_FROM = 2 * BUFFER
"""Bytes from which a thread of its own pays."""


async def take_body(reactor: Any, request: Any, upload: Upload, length: int) -> None:
    """Have the rest of a large body carried by a pump, once what came with its headers is taken care of."""
    lost: list[object] = []
    request.notifyFinish().addErrback(lost.append)
    await sleep(reactor, 0)
    transport, channel = request.transport, request.channel
    if lost or upload.source is not transport:
        return
    transport.pauseProducing()
    await upload.receiver.drain()
    if lost or upload.source is not transport or upload.receiver.error is not None:
        return
    left = length - request.body.streamed
    if left < BUFFER:
        transport.resumeProducing()
        return

    def arrived(count: int) -> None:
        upload.receiver.written_elsewhere(count)
        if not lost:
            channel.dataReceived(stand_in(count))

    def failed(error: OSError) -> None:
        upload.receiver.error = error
        transport.abortConnection()

    upload.receiver.set_producer(None)
    request.body.pumped = True
    pump = upload.pump = ReceivingPump(
        reactor,
        transport,
        fd=upload.fd,
        position=upload.receiver.position,
        count=left,
        digest=upload.receiver.digest,
        arrived=arrived,
        failed=failed,
    )
    request.notifyFinish().addErrback(lambda _: pump.stop())
    await pump.ended()
    upload.pump = None


async def stream_file(reactor: Any, request: Any, opened: OpenFile, first: int, digest: RunningHash) -> None:
    """Answer with the bytes from `first` on, through Twisted. Raises OSError, EOFError, CancelledError."""
    sender = FileSender(reactor, opened.fd, first, opened.size, digest=digest)
    request.notifyFinish().addErrback(lambda _: sender.cancel())
    request.registerProducer(sender, True)
    try:
        await sender.start(request)
    finally:
        await sender.when_idle()
    request.unregisterProducer()


async def pump_file(reactor: Any, request: Any, opened: OpenFile, first: int, digest: RunningHash) -> None:
    """The same by a pump; it sends the answer's head too, so that nothing of it can be late. Raises the same."""
    over: Deferred[None] = Deferred()
    head = b"HTTP/1.1 %d OK\r\n" % request.code
    for name, values in request.responseHeaders.getAllRawHeaders():
        head += b"".join(b"%s: %s\r\n" % (name, value) for value in values)
    request.startedWriting = 1
    pump = SendingPump(
        reactor,
        request.transport,
        head=head + b"\r\n",
        fd=opened.fd,
        position=first,
        end=opened.size,
        digest=digest,
        over=lambda error: over.callback(None) if error is None else over.errback(error),
    )
    request.notifyFinish().addErrback(lambda _: pump.stop())
    await over
