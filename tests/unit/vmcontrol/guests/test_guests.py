"""The registry of guests: HELLO, STILL_ALIVE, BYE, vm_gc_grace, paused VMs."""

from __future__ import annotations

from vmcontrol.guests.registry import GUEST_LIMIT, Change, Guests
from vmcontrol.protocol.messages import Bye, Hello, StillAlive

A, B = "02:00:00:00:00:0A", "02:00:00:00:00:0B"


def test_hello_and_the_beacon_of_an_unknown_guest_register() -> None:
    guests = Guests(30)
    assert guests.heard(Hello(A, "10.0.2.15", 2, "VMMain"), 0) is Change.REGISTERED
    assert guests.heard(StillAlive(B, "192.168.56.101"), 0) is Change.REGISTERED
    assert guests.heard(StillAlive(A, "10.0.2.15", 2), 1) is Change.NONE
    assert guests.heard(Hello(A, "10.0.2.15", 2), 1) is Change.REGISTERED, "a new connection"
    assert {guest.id for guest in guests.all()} == {A, B}
    b = guests.get(B)
    assert b is not None
    assert (b.protocol, b.ip) == (1, "192.168.56.101")


def test_bye_removes() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    assert guests.heard(Bye(A, ""), 1) is Change.GONE
    assert guests.heard(Bye(A, ""), 1) is Change.NONE
    assert not guests.is_there(A)


def test_warned_once_after_the_grace_dropped_after_one_and_a_half() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    assert guests.next_deadline() == 30
    assert guests.expire(29.9) == ([], [])
    warned, dropped = guests.expire(30)
    assert [g.id for g in warned] == [A]
    assert dropped == []
    assert guests.expire(40) == ([], [])
    assert guests.next_deadline() == 45
    _, dropped = guests.expire(45)
    assert [g.id for g in dropped] == [A]
    assert guests.next_deadline() is None


def test_any_sign_of_life_counts() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    guests.expire(31)
    assert guests.sign_of_life(A, 40) is Change.CONFIRMED
    assert guests.expire(60) == ([], [])
    assert guests.sign_of_life(B, 40) is Change.NONE
    assert guests.get(B) is None


def test_a_paused_guest_is_not_dropped_and_counts_as_there_when_it_is_heard_again() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    guests.vm_paused(A)
    assert guests.next_deadline() is None
    assert guests.expire(3600) == ([], [])
    guests.vm_unpaused(A, 3600)
    assert not guests.is_there(A)
    assert guests.next_deadline() == 3630
    assert guests.heard(StillAlive(A, ""), 3601) is Change.CONFIRMED
    assert guests.is_there(A)


def test_words_that_were_on_their_way_when_the_vm_was_paused_say_nothing_of_later() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    guests.vm_paused(A)
    assert guests.sign_of_life(A, 0.1) is Change.NONE
    assert guests.heard(StillAlive(A, ""), 0.1) is Change.NONE
    guests.heard(Hello(A, ""), 0.2)
    assert not guests.is_there(A)
    assert guests.expire(3600) == ([], []), "a paused guest cannot give a sign"
    guests.vm_unpaused(A, 3600)
    assert not guests.is_there(A)
    assert guests.sign_of_life(A, 3601) is Change.CONFIRMED
    assert guests.is_there(A)


def test_a_guest_whose_link_broke_counts_when_it_is_heard_again() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    guests.unconfirm(A)
    assert not guests.is_there(A)
    assert guests.get(A) is not None
    guests.heard(Hello(A, ""), 1)
    assert guests.is_there(A)


def test_a_vm_that_was_started_anew_has_no_registered_guest() -> None:
    guests = Guests(30)
    guests.heard(Hello(A, ""), 0)
    assert guests.vm_gone(A)
    assert not guests.vm_gone(A)
    assert not guests.is_there(A)


def test_ids_cannot_fill_the_memory() -> None:
    guests = Guests(30)
    for number in range(GUEST_LIMIT + 10):
        guests.heard(Hello(f"id {number}", "x" * 100_000, 2, "y" * 100_000), 0)
    assert len(guests) == GUEST_LIMIT
    assert len(guests.all()[0].ip) + len(guests.all()[0].agent) <= 400
