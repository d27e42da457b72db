"""Replies are taken one at a time, and a silent site is late, not lost."""

import gc
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

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
        return [self.reply() for i in ids if self.polls >= self.answers_at[i]]

    def reply(self) -> Any:
        """One update and one number, in records as Flower makes them."""
        update, note = ArrayRecord({"values": Array(np.zeros(9))}), ConfigRecord({"n": 1})
        content = RecordDict({"update": update, "note": note})
        return SimpleNamespace(content=content, has_content=lambda: True)


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


def test_an_update_is_freed_when_the_next_is_asked_for_though_nobody_looks_for_cycles() -> None:
    messages = {site: SimpleNamespace(id=site) for site in "abc"}
    network = FakeNetwork(dict.fromkeys(messages, 1))
    updates: list[weakref.ref[Array]] = []
    gc.disable()
    try:
        for arrival in exchange(network, messages, deadline=30):  # type: ignore[arg-type]
            assert arrival.message is not None
            assert not any(update() for update in updates)
            (record,) = arrival.message.content.array_records.values()
            updates.append(weakref.ref(record["values"]))
            assert updates[-1]() is not None
            assert arrival.message.content.config_records["note"]["n"] == 1
    finally:
        gc.enable()
    assert len(updates) == 3


def test_pauses_are_short_at_first_and_never_a_larger_share_of_the_wait_than_needed() -> None:
    waits = [0.0, 0.5, 4.0, 10.0, 40.0, 3600.0]
    pauses = [poll_pause(wait) for wait in waits]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.1 and pauses[-1] == 1.0
    assert all(pause <= max(0.1, 0.02 * wait) for pause, wait in zip(pauses, waits, strict=True))
