"""The handshake of the link: who knows the secret gets in, nobody else does, and nothing else happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.protocol.handshake import LINE_LIMIT, GuestHandshake, HostHandshake, Mode, Outcome, Step

SECRET = b"a secret of the run"


def shake(host: HostHandshake, guest: GuestHandshake, *, piece: int = 10_000) -> list[bytes]:
    """Let both talk until they have nothing to say; what the host said."""
    said = [host.opening]
    to_guest, to_host = host.opening, b""
    while to_guest or to_host:
        chunk, to_guest = to_guest[:piece], to_guest[piece:]
        if chunk:
            to_host += guest.receive(chunk).send
        chunk, to_host = to_host[:piece], to_host[piece:]
        if chunk:
            answer = host.receive(chunk).send
            said.append(answer)
            to_guest += answer
    return said


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_both_know_the_secret(mode: Mode, piece: int) -> None:
    host, guest = HostHandshake(SECRET, mode), GuestHandshake(SECRET)
    shake(host, guest, piece=piece)
    assert host.outcome is Outcome.OPEN
    assert guest.outcome is Outcome.OPEN
    assert guest.mode is mode


def test_the_lines_are_those_of_the_document() -> None:
    host = HostHandshake(b"key", Mode.HTTP, nonce="0" * 32)
    guest = GuestHandshake(b"key", nonce="1" * 32)
    assert host.opening == b"VMLINK/1 http " + b"0" * 32 + b"\n"
    proof = guest.receive(host.opening).send
    assert proof.startswith(b"PROOF " + b"1" * 32 + b" ")
    assert len(proof) == 6 + 32 + 1 + 64 + 1
    answer = host.receive(proof).send
    assert answer.startswith(b"PROOF ")
    assert answer[6:] != proof[39:]
    assert guest.receive(answer) == Step(b"OK\n", Outcome.OPEN, b"")


def test_a_host_with_another_secret_is_denied_without_a_reason() -> None:
    host, guest = HostHandshake(b"other", Mode.STOMP), GuestHandshake(SECRET)
    proof = guest.receive(host.opening).send
    assert host.receive(proof) == Step(b"", Outcome.DENIED, b"")  # it does not even show its own proof
    assert guest.receive(b"PROOF " + b"0" * 64 + b"\n") == Step(b"DENIED\n", Outcome.DENIED, b"")
    assert guest.receive(b"anything") == Step(outcome=Outcome.DENIED)


def test_a_guest_with_another_secret_gets_no_proof_from_the_host() -> None:
    host, guest = HostHandshake(SECRET, Mode.STOMP), GuestHandshake(b"other")
    assert shake(host, guest) == [host.opening, b""]
    assert host.outcome is Outcome.DENIED
    assert not host.guest_proved


def test_a_recorded_handshake_opens_nothing() -> None:
    host = HostHandshake(SECRET, Mode.HTTP)
    recorded = shake(host, GuestHandshake(SECRET))
    again = GuestHandshake(SECRET)
    steps = [again.receive(data) for data in recorded]
    assert steps[-1].outcome is Outcome.DENIED
    assert again.outcome is Outcome.DENIED


def test_a_guests_own_proof_is_not_the_hosts() -> None:
    guest = GuestHandshake(SECRET)
    proof = guest.receive(b"VMLINK/1 http " + b"0" * 32 + b"\n").send
    assert guest.receive(b"PROOF " + proof.split()[2] + b"\n").outcome is Outcome.DENIED


def test_the_mode_is_part_of_what_is_proved() -> None:
    host, guest = HostHandshake(SECRET, Mode.HTTP), GuestHandshake(SECRET)
    proof = guest.receive(host.opening.replace(b"http", b"stomp")).send
    assert host.receive(proof).outcome is Outcome.DENIED


def test_an_empty_secret_opens_nothing() -> None:
    host, guest = HostHandshake(b"", Mode.HTTP), GuestHandshake(b"")
    assert guest.receive(host.opening).outcome is Outcome.DENIED
    other = GuestHandshake(b"x")
    assert host.receive(other.receive(host.opening).send).outcome is Outcome.DENIED


@given(st.binary(max_size=200))
def test_what_follows_the_handshake_is_handed_on(rest: bytes) -> None:
    host, guest = HostHandshake(SECRET, Mode.HTTP), GuestHandshake(SECRET)
    answer = host.receive(guest.receive(host.opening).send).send
    step = guest.receive(answer + rest)
    assert (step.outcome, step.rest) == (Outcome.OPEN, rest)
    assert host.receive(step.send + rest) == Step(b"", Outcome.OPEN, rest)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=600),
        st.sampled_from([b"OK\n", b"DENIED\n", b"VMLINK/1 stomp " + b"a" * 32 + b"\n", b"PROOF " + b"0" * 64 + b"\n"]),
        st.just(b"PROOF " + b"0" * 32 + b" " + b"f" * 64 + b"\n"),
    ),
    max_size=8,
)


@given(LINES)
def test_arbitrary_bytes_never_open_anything(pieces: list[bytes]) -> None:
    for end in (GuestHandshake(SECRET), HostHandshake(SECRET, Mode.STOMP)):
        for piece in pieces:
            step = end.receive(piece)
            assert step.outcome in (None, Outcome.DENIED)
            assert step.rest == b""
            assert len(step.send) <= LINE_LIMIT


@pytest.mark.parametrize("make", [lambda: GuestHandshake(SECRET), lambda: HostHandshake(SECRET, Mode.HTTP)])
def test_a_line_without_end_is_denied_at_the_limit(make: object) -> None:
    assert callable(make)
    end = make()
    assert end.receive(b"V" * (LINE_LIMIT - 1)).outcome is None
    assert end.receive(b"V").outcome is Outcome.DENIED
