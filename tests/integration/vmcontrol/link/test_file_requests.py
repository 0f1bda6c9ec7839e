"""What the agent answers to requests for files that come out of order, twice, late, or while files change."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred

from guest.files.uploads import UNFINISHED_LIMIT
from tests.integration.vmcontrol.transfer.test_file_transfer import MB, Rig, digest, in_rig, rig
from tests.support.linkrig import LIMIT_S
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import with_limit
from vmcontrol.common.filestream import CHUNK
from vmcontrol.common.httpclient import BytesBody
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.transfer.interface import TransferFailed

reactor: Any = global_reactor


class HalfBody:
    """A body of which only the first bytes come."""

    def __init__(self, content: bytes, length: int) -> None:
        self.content, self.length = content, length

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self.content)
        return Deferred()

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...
    def stopProducing(self) -> None: ...


async def begin(r: Rig, transfer: str, total: int, path: str = "there") -> dict[str, Any]:
    query = {"path": path, "total": str(total), "mode": "644"}
    return await r.link.http("POST", f"/v1/transfers/{transfer}", query=query)


async def put(r: Rig, transfer: str, body: Any, first: int, total: int) -> dict[str, Any]:
    headers = {"Transfer-Id": transfer, "Content-Range": f"bytes {first}-{first + body.length - 1}/{total}"}
    path = f"/v1/transfers/{transfer}"
    response = await r.link.requests.send("PUT", path, headers=headers, body=body, limit=LIMIT_S)
    return await r.link.requests.answer(response, path, limit=LIMIT_S)


async def commit(r: Rig, transfer: str, said: Mapping[str, str]) -> dict[str, Any]:
    return await r.link.http("POST", f"/v1/transfers/{transfer}/commit", query=said)


def sha256(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest()}


async def refused(asking: Any) -> GuestRefused:
    with pytest.raises(GuestRefused) as caught:
        await asking
    return caught.value


@pytest.mark.parametrize("sent", [1_200_000, 5_000_001])
@pytest_twisted.ensureDeferred
async def test_a_transfer_that_is_taken_up_cuts_the_connection_it_had(sent: int, tmp_path: Path) -> None:
    """What a restored guest needs: its old connection is dead and does not know it."""
    async with rig(tmp_path) as r:
        content = os.urandom(8 * MB)
        assert (await begin(r, "one", len(content)))["have"] == 0
        old = eventloop.start(put(r, "one", HalfBody(content[:sent], len(content)), 0, len(content)))

        async def until_all_is_there() -> None:
            # The agent says what is written; it writes when it has a CHUNK, or when the body ends.
            while (await r.link.http("GET", "/v1/transfers/one"))["have"] <= sent - CHUNK:
                await eventloop.sleep(reactor, 0.01)

        await with_limit(reactor, LIMIT_S, "the first part", until_all_is_there())
        again = await begin(r, "one", len(content))
        with pytest.raises(LinkDown):
            await with_limit(reactor, LIMIT_S, "the end of the old connection", old)
        have = again["have"]
        assert 0 < have <= sent
        assert await put(r, "one", BytesBody(content[have:]), have, len(content)) == {"have": len(content)}
        for _ in range(2):  # the second time as if the first answer had been lost
            assert (await commit(r, "one", sha256(content)))["complete"] is True
        assert (r.base / "there").read_bytes() == content
        assert (await begin(r, "one", len(content)))["complete"] is True


@in_rig
async def test_bytes_at_the_wrong_place_are_not_taken(r: Rig) -> None:
    await begin(r, "one", 10)
    late = await refused(put(r, "one", BytesBody(b"56789"), 5, 10))
    assert (late.status, late.body["have"]) == (409, 0)
    assert (await refused(put(r, "one", BytesBody(b"12345"), 0, 11))).status == 409
    assert (await refused(put(r, "none", BytesBody(b"12345"), 0, 10))).status == 404
    assert (await refused(begin(r, "one", 11))).status == 409
    assert (await refused(begin(r, "../one", 10))).status in (400, 404)
    assert await put(r, "one", BytesBody(b"01234"), 0, 10) == {"have": 5}
    early = await refused(commit(r, "one", sha256(b"01234")))
    assert (early.status, early.body["have"]) == (409, 5)
    assert await put(r, "one", BytesBody(b"56789"), 5, 10) == {"have": 10}
    assert (await refused(commit(r, "one", {"sha256": "nonsense"}))).status == 400
    assert (await refused(commit(r, "one", sha256(b"something else")))).status == 422
    assert list(r.base.iterdir()) == []
    assert (await refused(commit(r, "one", sha256(b"0123456789")))).status == 404


@in_rig
async def test_of_too_many_unfinished_transfers_the_oldest_goes(r: Rig) -> None:
    for number in range(UNFINISHED_LIMIT + 1):
        await begin(r, f"t{number}", 10, f"file{number}")
    assert (await refused(r.link.http("GET", "/v1/transfers/t0"))).status == 404
    assert len(r.leftovers()) == UNFINISHED_LIMIT
    for number in range(UNFINISHED_LIMIT + 1):
        await r.link.http("DELETE", f"/v1/transfers/t{number}")
    assert list(r.base.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_a_connection_that_breaks_while_the_guest_syncs_costs_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, "slow-sync") as r:
        source = r.make("source", 3 * MB)
        copying = eventloop.start(r.files.put(source, "there"))

        async def until_it_is_renamed() -> None:
            while not (r.base / "there").exists():
                await eventloop.sleep(reactor, 0.01)

        await with_limit(reactor, LIMIT_S, "the file", until_it_is_renamed())
        r.proxy.cut_all()
        sent = await copying
        assert sent.tries == 2
        assert sent.sha256 == digest(source) == digest(r.base / "there")
        assert r.leftovers() == []


@in_rig
async def test_a_file_that_shrinks_meanwhile_is_fetched_anew(r: Rig) -> None:
    there = r.make("there", 60 * MB).rename(r.base / "there")
    shrunk: list[int] = []

    def shrink(done: int, _total: int) -> None:
        if not shrunk:
            shrunk.append(done)
            os.truncate(there, 20 * MB)

    fetched = await r.files.get("there", r.here / "back", progress=shrink)
    assert shrunk
    assert fetched.size == 20 * MB
    assert fetched.tries > 1
    assert digest(r.here / "back") == digest(there)


@in_rig
async def test_a_file_that_goes_meanwhile_is_told_and_leaves_nothing(r: Rig) -> None:
    there = r.make("there", 60 * MB).rename(r.base / "there")
    r.proxy.to_host.cut_after = [10 * MB]

    def remove(_done: int, _total: int) -> None:
        there.unlink(missing_ok=True)

    with pytest.raises(Exception, match="no such file in the guest"):
        await r.files.get("there", r.here / "back", progress=remove)
    assert not (r.here / "back").exists()


@in_rig
async def test_a_digest_is_of_the_state_that_was_sent(r: Rig) -> None:
    there = r.base / "there"
    there.write_bytes(b"one")
    response = await r.link.requests.send("GET", "/v1/files", query={"path": "there"}, limit=LIMIT_S)
    etag = response.headers.getRawHeaders(b"ETag")[0].decode()
    query = {"path": "there", "etag": etag}
    assert (await r.link.http("GET", "/v1/digest", query=query))["sha256"] == sha256(b"one")["sha256"]
    there.write_bytes(b"another")
    assert (await refused(r.link.http("GET", "/v1/digest", query=query))).status == 412


@in_rig
async def test_a_guest_that_asks_for_an_unknown_digest_is_not_followed(r: Rig) -> None:
    source = r.make("source", 3 * MB)
    ask = r.link.http

    async def other(method: str, path: str, **more: Any) -> dict[str, Any]:
        return {**await ask(method, path, **more), "digest": "md5"}

    r.link.http = other  # type: ignore[method-assign]
    with pytest.raises(TransferFailed, match="'md5'"):
        await r.files.put(source, "there")
    assert list(r.base.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_a_guest_may_have_copies_confirmed_by_sha512(tmp_path: Path) -> None:
    """As an emulated one does: there it is the faster one. What is told of the copy is its SHA-256 all the same."""
    async with rig(tmp_path, "sha512") as r:
        assert (await begin(r, "one", 1))["digest"] == "sha512"
        assert (await refused(commit(r, "one", sha256(b"x")))).status == 409
        await r.link.http("DELETE", "/v1/transfers/one")
        source = r.make("source", 9 * MB)
        for trouble in (r.proxy.to_guest, r.proxy.to_host):
            trouble.cut_after, trouble.since_cut = [4 * MB + 1], 0
            trouble.flip_at = [trouble.seen + 8 * MB]
        sent = await r.files.put(source, "there")
        fetched = await r.files.get("there", r.here / "back")
        assert sent.tries == fetched.tries == 3  # cut, then one byte wrong
        assert sent.sha256 == fetched.sha256 == digest(source) == digest(r.here / "back") == digest(r.base / "there")
        assert r.leftovers() == []
