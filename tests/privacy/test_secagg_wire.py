"""Whatever arrives is read or refused by name, at a site and at the server."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import begin, terms

from fedseg.errors import ProtocolError
from fedseg.privacy import secagg, secagg_server
from fedseg.privacy.roster import party_of
from fedseg.privacy.secagg_state import State
from fedseg.privacy.secagg_wire import Keys, Roster, Shares, Unmasking, unpack

AGREED = terms()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
KEY = st.binary(min_size=32, max_size=32).map(bytes.hex) | JSON
ADVERT = st.fixed_dictionaries(
    {"name": st.text(max_size=3) | st.just("a"), "channel": KEY, "mask": KEY, "commitment": KEY},
    optional={"signature": JSON},
)
PAIRS = st.lists(
    st.tuples(st.integers(-1, 5), st.binary(min_size=16, max_size=64).map(bytes.hex) | JSON)
)
NEARLY = st.fixed_dictionaries(
    {
        "stage": st.sampled_from(["keys", "roster", "shares", "inbox", "unmask", "reveal"]),
        "run": st.just("run-1") | JSON,
        "round": st.just(1) | JSON,
        "purpose": st.just("train") | JSON,
    },
    optional={
        "advert": ADVERT,
        "adverts": st.lists(ADVERT, max_size=5),
        "sealed": PAIRS,
        "survivors": st.lists(st.integers(-1, 9)) | JSON,
        "signatures": PAIRS,
        "shares": PAIRS,
    },
)
ANYTHING = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    NEARLY.map(lambda value: json.dumps(value).encode()),
    st.none(),
    st.text(),
)


def stages() -> tuple[Any, list[State]]:
    """A party of four and one site's state at each stage."""
    states, sent = begin(4, AGREED)
    party = party_of([secagg_server.read_keys(data, AGREED) for data in sent], AGREED)
    roster = secagg_server.roster_message(party)
    shared = [secagg.share(state, roster, AGREED) for state in states]
    sealed = {i: secagg_server.read_shares(data, party, i) for i, (_, data) in enumerate(shared)}
    inbox = secagg_server.inbox_message(party, 0, sealed)
    received = secagg.receive(shared[0][0], inbox, AGREED)
    masked, _ = secagg.mask(received, AGREED, np.zeros(4, np.uint32))
    return party, [states[0], shared[0][0], masked]


PARTY, (STARTED, SHARED, MASKED) = stages()


@given(data=ANYTHING)
@settings(max_examples=400, deadline=None)
def test_nothing_but_protocol_errors(data: Any) -> None:
    steps = (
        lambda: secagg.share(STARTED, data, AGREED),
        lambda: secagg.receive(SHARED, data, AGREED),
        lambda: secagg.confirm(MASKED, data, AGREED, signer=None),
        lambda: secagg.reveal(MASKED, data, AGREED),
        lambda: secagg_server.read_shares(data, PARTY, 0),
        lambda: secagg_server.read_confirmation(data, PARTY),
        lambda: secagg_server.read_revealed(data, PARTY, 0, range(4)),
    )
    for step in steps:
        with pytest.raises(ProtocolError):
            step()
    with contextlib.suppress(ProtocolError):
        secagg_server.read_keys(data, AGREED)
    if isinstance(data, str):
        with pytest.raises(ProtocolError):
            State.from_json(data)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_changed_byte_never_passes_for_shares(data: Any) -> None:
    good = secagg_server.roster_message(PARTY)
    place = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        secagg.share(STARTED, bytes(changed), AGREED)
    except ProtocolError:
        return
    # What still reads is another key of another site: its shares can't be opened by it.
    assert json.loads(bytes(changed)) != json.loads(good) or changed.lower() == good.lower()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Roster, b"[" * 100_000),
        (
            Roster,
            b'{"stage":"roster","run":"run-1","round":1,"purpose":"train","adverts":'
            + b"[" * 50_000,
        ),
        (Unmasking, b" " * 2**20 + b"{}"),
        (Shares, json.dumps({"run": "run-1", "round": 1, "sealed": [[0, "00"]] * 2000}).encode()),
        (Keys, b'{"run":"run-1","round":1e0}'),
        (Keys, b'{"run":"../run-1","round":1}'),
    ],
)
def test_large_and_deep_messages_are_refused(kind: Any, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(kind, data, AGREED.stamp)


def test_an_error_does_not_repeat_what_was_sent() -> None:
    secret = "ab" * 20
    with pytest.raises(ProtocolError) as error:
        unpack(Keys, json.dumps({"stage": secret}).encode(), AGREED.stamp)
    assert secret not in str(error.value) and "\n" not in str(error.value)
