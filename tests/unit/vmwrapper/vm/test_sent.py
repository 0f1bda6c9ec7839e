"""What left the slot is not sent again, whatever the guest goes back to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmwrapper.vm.sent import SENT_LIMIT, Life, SentRecord


def life(rollbacks: int = 0, went_back_to: int = 0, snapshot: int = 0) -> Life:
    return Life("id", rollbacks, went_back_to, snapshot)


def send(record: SentRecord, content: bytes, now: Life) -> bool:
    """As a look at the guest does: whether it was sent."""
    record.guest_is(now)
    again = record.is_sent("news", content)
    if not again:
        record.sends("news", content, now)
    record.is_gone("news", content, now)
    return not again


def test_equal_messages_of_one_life_are_all_sent(tmp_path: Path) -> None:
    record = SentRecord(tmp_path / "m")
    assert [send(record, b"tick", life()) for _ in range(3)] == [True] * 3


def test_after_a_rollback_what_was_sent_since_the_snapshot_is_not_sent_again_and_new_things_are(tmp_path: Path) -> None:
    record = SentRecord(tmp_path / "m")
    assert send(record, b"before", life(snapshot=0))
    for content in (b"a", b"b", b"b"):
        assert send(record, content, life(snapshot=1))
    assert send(record, b"c", life(snapshot=2))
    back = life(rollbacks=1, went_back_to=1, snapshot=2)
    assert [send(record, content, back) for content in (b"a", b"b", b"b")] == [False] * 3
    assert send(record, b"b", back), "a third one is new"
    assert send(record, b"other", back)
    assert send(record, b"before", back), "of before the snapshot: this one is new"
    again = life(rollbacks=2, went_back_to=1, snapshot=2)
    assert [send(record, content, again) for content in (b"a", b"b", b"b", b"b", b"other")] == [False] * 5
    assert not send(record, b"c", again)


def test_the_record_survives_restarts_and_a_crash_between_sending_and_emptying(tmp_path: Path) -> None:
    path = tmp_path / "m"
    record = SentRecord(path)
    record.guest_is(life())
    record.sends("news", b"half way", life())
    record.uploads("part")
    record.delivers("trickle_down_1")
    record = SentRecord(path)
    record.guest_is(life())
    assert record.is_sent("news", b"half way")
    assert not record.is_sent("other", b"half way")
    assert record.is_uploaded("part")
    assert record.is_delivered("trickle_down_1")
    record.guest_is(life(rollbacks=1))
    assert not record.is_delivered("trickle_down_1"), "the guest may be of before it"
    assert record.is_uploaded("part"), "what the project has, it has"


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    record = SentRecord(tmp_path / "m")
    record.guest_is(life())
    record._sent = record._sent * 0
    for number in range(5):
        record.sends("news", str(number).encode(), life())
    record._sent = record._sent * SENT_LIMIT
    record.sends("news", b"x", life())
    assert len(record._sent) == SENT_LIMIT
    assert (tmp_path / "m").stat().st_size < 200_000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"to": 7, "sent": [1, ["a", true, 1]], "uploads": {}}']
)
def test_a_damaged_one_is_like_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    record = SentRecord(tmp_path / "m")
    assert send(record, b"tick", life())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["to", "sent", "uploads"]), inner),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.dictionaries(st.sampled_from(["delivered", "to", "uploads", "sent"]), JSON))
def test_nothing_in_the_file_stops_a_job(tmp_path: Path, value: object) -> None:
    (tmp_path / "m").write_text(json.dumps(value))
    SentRecord(tmp_path / "m").guest_is(life(rollbacks=2))
