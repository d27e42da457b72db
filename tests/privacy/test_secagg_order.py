"""Genuine messages in any order, replayed, of other rounds: a site gives away one share of each."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st
from protocol import begin, terms

from fedseg.errors import ProtocolError
from fedseg.privacy import secagg, secagg_server
from fedseg.privacy.roster import Party, Terms, party_of
from fedseg.privacy.secagg_state import State
from fedseg.privacy.secagg_wire import Revealed, unpack

TERMS = (terms(1), terms(1, purpose="evaluate"), terms(2))
SITES = 4
STEPS = ("next", "next", "next", "start", "share", "receive", "mask", "reveal")
"""`next` is the step that is due, with a good message: so that draws get far."""

AFTER = {"keys": "share", "shares": "receive", "received": "mask", "masked": "reveal"}
MESSAGE_OF = {"share": "roster", "receive": "inbox", "reveal": "unmask"}


def survivors() -> list[list[int]]:
    """All lists that reach the threshold of three of four."""
    return [list(c) for n in (3, 4) for c in itertools.combinations(range(SITES), n)]


@dataclass
class Server:
    """A server that makes genuine messages of each round, with what the site sent it so far."""

    others: dict[Terms, tuple[list[State], list[bytes]]]
    parties: dict[Terms, Party] = field(default_factory=dict)
    messages: list[tuple[str, Terms, bytes]] = field(default_factory=list)

    def takes_keys(self, agreed: Terms, data: bytes) -> None:
        states, sent = self.others[agreed]
        adverts = [secagg_server.read_keys(part, agreed) for part in (data, *sent)]
        party = self.parties[agreed] = party_of(adverts, agreed)
        roster = secagg_server.roster_message(party)
        sealed = {}
        for index, state in enumerate(states, 1):
            _, shares = secagg.share(state, roster, agreed)
            sealed[index] = secagg_server.read_shares(shares, party, index)
        inbox = secagg_server.inbox_message(party, 0, sealed)
        self.messages += [("roster", agreed, roster), ("inbox", agreed, inbox)]
        for chosen in survivors():
            message = secagg_server.unmask_message(party, chosen)
            self.messages.append(("unmask", agreed, message))

    def good(self, step: str, agreed: Terms) -> list[bytes]:
        """Messages that fit a step, the newest first."""
        kind = MESSAGE_OF.get(step, "roster")
        found = [data for what, of, data in self.messages if (what, of) == (kind, agreed)]
        return found[::-1][:5] or [b""]


def made() -> dict[Terms, tuple[list[State], list[bytes]]]:
    return {agreed: begin(SITES - 1, agreed) for agreed in TERMS}


OTHERS = made()


@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.sampled_from(TERMS), st.integers(0, 10**6)),
        min_size=10,
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_order_a_site_reveals_one_share_of_each_secret(
    asked: list[tuple[str, Terms, int]],
) -> None:
    server, state = Server(OTHERS), None
    held: dict[bytes, set[bytes]] = {}
    revealed: dict[tuple[bytes, int], set[bytes]] = defaultdict(set)
    masked: dict[bytes, int] = defaultdict(int)
    for wanted, terms_drawn, draw in asked:
        step, agreed = wanted, terms_drawn
        try:
            if step == "start":
                state, data = secagg.start(agreed, name="own", before=state)
                server.takes_keys(agreed, data)
                continue
            if state is None:
                continue
            if step == "next":
                step = AFTER.get(state.stage, "reveal")
                agreed = next(each for each in TERMS if each.stamp.items() <= dict(state).items())
                choice = server.good(step, agreed)
            else:
                choice = [data for *_, data in server.messages]
            message = choice[draw % len(choice)]
            state, given_away = _step(step)(state, message, agreed)
        except ProtocolError:
            continue
        digest = server.parties[agreed].digest
        masked[digest] += step == "mask"
        if step == "receive":
            held[digest] = {part for h in state.held.values() for part in (h.self_mask, h.mask)}
        if step == "reveal":
            shares = unpack(Revealed, given_away, agreed.stamp).shares
            for owner, part in shares:
                revealed[digest, owner].add(part)
                assert part in held[digest]
            # Nothing secret is left, whatever came before.
            assert set(state.model_dump(exclude_defaults=True)) <= {
                *("run", "round", "purpose", "stage")
            }
    event(f"revealed in {len({d for d, _ in revealed})} rounds")
    assert all(count <= 1 for count in masked.values())
    assert all(len(parts) == 1 for parts in revealed.values())


def _step(name: str) -> Callable[[State, bytes, Terms], tuple[State, Any]]:
    return {
        "share": lambda state, data, agreed: secagg.share(state, data, agreed),
        "receive": lambda state, data, agreed: (secagg.receive(state, data, agreed), None),
        "mask": lambda state, _, agreed: secagg.mask(state, agreed, np.zeros(4, np.uint32)),
        "reveal": lambda state, data, agreed: secagg.reveal(state, data, agreed),
    }[name]


def test_the_draws_do_reach_the_end() -> None:
    """The property above would hold for a site that refuses everything: this one doesn't."""
    for agreed in TERMS:
        server = Server(OTHERS)
        state, data = secagg.start(agreed, name="own")
        server.takes_keys(agreed, data)
        roster, inbox, *unmask = [data for *_, data in server.messages]
        state, _ = secagg.share(state, roster, agreed)
        state = secagg.receive(state, inbox, agreed)
        state, _ = secagg.mask(state, agreed, np.zeros(4, np.uint32))
        taken = 0
        for message in unmask:
            try:
                state, _ = secagg.reveal(state, message, agreed)
                taken += 1
            except ProtocolError:
                continue
        assert taken == 1 and state.stage == "done"
