"""Replies are taken one at a time, and a silent site is late, not lost."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from fedseg.federation.exchange import exchange, poll_pause


class FakeNetwork:
    """Answers message n at the n-th poll after its turn; `never` stays silent."""

    def __init__(self, answers_at: dict[str, int]) -> None:
        self.answers_at, self.polls, self.batches = answers_at, 0, []

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        return [message.id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        self.batches.append(len(ids))
        self.polls += 1
        return [SimpleNamespace(of=i) for i in ids if self.polls >= self.answers_at[i]]


def test_each_arrives_once_in_the_order_it_came() -> None:
    network = FakeNetwork({"a": 5, "b": 1, "c": 3})
    messages = {site: SimpleNamespace(id=site) for site in "abc"}
    arrivals = list(exchange(network, messages, deadline=30))  # type: ignore[arg-type]
    assert [arrival.site for arrival in arrivals] == ["b", "c", "a"]
    assert all(arrival.message is not None for arrival in arrivals)
    assert set(network.batches) == {1}


def test_late_sites_come_last_without_a_message() -> None:
    network = FakeNetwork({"a": 10**9, "b": 1})
    messages = {site: SimpleNamespace(id=site) for site in "ab"}
    arrivals = list(exchange(network, messages, deadline=0.3))  # type: ignore[arg-type]
    assert [(a.site, a.message is None) for a in arrivals] == [("b", False), ("a", True)]
    assert arrivals[1].seconds >= 0.3


def test_who_is_hurried_is_late_once_all_others_have_answered() -> None:
    network = FakeNetwork({"a": 10**9, "b": 5, "c": 1})
    messages = {site: SimpleNamespace(id=site) for site in "abc"}
    arrivals = list(exchange(network, messages, deadline=30, hurried={"a", "c"}))  # type: ignore[arg-type]
    assert [(a.site, a.message is None) for a in arrivals] == [
        ("c", False),
        ("b", False),
        ("a", True),
    ]
    assert arrivals[2].seconds < 5 and arrivals[2].message_id == "a"


def test_pauses_are_short_at_first_and_never_a_larger_share_of_the_wait_than_needed() -> None:
    waits = [0.0, 0.5, 4.0, 10.0, 40.0, 3600.0]
    pauses = [poll_pause(wait) for wait in waits]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.1 and pauses[-1] == 1.0
    assert all(pause <= max(0.1, 0.02 * wait) for pause, wait in zip(pauses, waits, strict=True))
