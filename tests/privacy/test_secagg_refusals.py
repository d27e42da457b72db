"""What a site refuses: lies about who is left, invented peers, messages out of turn."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from protocol import begin, pinned_by, run_round, terms

from fedseg.errors import ProtocolError, TooFewSites
from fedseg.privacy import secagg, secagg_server
from fedseg.privacy.roster import CONFIRM, Party, party_of, signed_list
from fedseg.privacy.secagg_keys import sign
from fedseg.privacy.secagg_state import State

AGREED = terms()
SIGNERS = [Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in range(8)]


def to_stage(
    stage: str, count: int = 4, signers: list[Ed25519PrivateKey] | None = None
) -> tuple[Party, list[State], dict[str, bytes]]:
    """Take all sites to a stage: `keys`, `shares`, `received`, `masked` or `confirmed`."""
    states, sent = begin(count, AGREED, signers=signers)
    party = party_of([secagg_server.read_keys(data, AGREED) for data in sent], AGREED)
    data = {"roster": secagg_server.roster_message(party)}
    sealed = {}
    for i in range(count) if stage != "keys" else ():
        pinned = pinned_by(signers, i)
        states[i], answer = secagg.share(states[i], data["roster"], AGREED, pinned=pinned)
        sealed[i] = secagg_server.read_shares(answer, party, i)
    data["inbox"] = secagg_server.inbox_message(party, 0, sealed) if sealed else b""
    for i in range(count) if stage in ("received", "masked", "confirmed") else ():
        inbox = secagg_server.inbox_message(party, i, sealed)
        states[i] = secagg.receive(states[i], inbox, AGREED)
        if stage != "received":
            states[i], _ = secagg.mask(states[i], AGREED, np.zeros(8, np.uint32))
    data["confirm"] = secagg_server.confirm_message(party, range(count))
    for i in range(count) if stage == "confirmed" else ():
        states[i], _ = secagg.confirm(
            states[i], data["confirm"], AGREED, signer=signers[i] if signers else None
        )
    data["unmask"] = secagg_server.unmask_message(party, range(count))
    return party, states, data


def edited(data: bytes, **changed: Any) -> bytes:
    return json.dumps({**json.loads(data), **changed}).encode()


def test_a_server_that_asks_for_both_shares_of_a_site_is_refused() -> None:
    _, states, data = to_stage("masked")
    after, _ = secagg.reveal(states[0], data["unmask"], AGREED)
    # Again, with site 3 as one that dropped out: its other share would be next.
    for lie in (data["unmask"], edited(data["unmask"], survivors=[0, 1, 2])):
        with pytest.raises(ProtocolError, match="after stage done"):
            secagg.reveal(after, lie, AGREED)
    # In one message there is no way to say it.
    for lie in (
        edited(data["unmask"], survivors=[0, 1, 2, 3, 3]),
        edited(data["unmask"], dropped=[3]),
    ):
        with pytest.raises(ProtocolError):
            secagg.reveal(states[0], lie, AGREED)


def test_two_groups_of_sites_cannot_be_told_two_stories() -> None:
    """With four sites, three must be left: the groups would share two sites."""
    _, states, data = to_stage("masked")
    with pytest.raises(TooFewSites):
        secagg.reveal(states[0], edited(data["unmask"], survivors=[0, 1]), AGREED)


@pytest.mark.parametrize(
    "survivors", [[1, 2, 3], [0, 2, 1], [0, 1, 1023], [-1, 0, 1], [0, 1, 2.5], "012", [], None]
)
def test_survivors_that_cannot_be_are_refused(survivors: Any) -> None:
    _, states, data = to_stage("masked")
    with pytest.raises(ProtocolError):
        secagg.reveal(states[0], edited(data["unmask"], survivors=survivors), AGREED)


def test_a_survivor_that_sent_no_shares_is_refused() -> None:
    party, states, data = to_stage("shares")
    inbox = json.loads(data["inbox"])
    short = edited(data["inbox"], sealed=[item for item in inbox["sealed"] if item[0] != 3])
    state = secagg.receive(states[0], short, AGREED)
    state, _ = secagg.mask(state, AGREED, np.zeros(8, np.uint32))
    with pytest.raises(ProtocolError, match="sent no shares"):
        secagg.reveal(state, secagg_server.unmask_message(party, range(4)), AGREED)


def test_pinned_round_is_the_same_sum() -> None:
    words = [np.full(64, i, np.uint32) for i in range(5)]
    for drop in ({}, {2: "upload"}, {2: "confirm"}, {2: "unmask"}):
        done = run_round(words, AGREED, signers=SIGNERS[:5], drop=drop)
        assert done.party.signed
        assert (done.total.words == sum(done.total.sites)).all()


def test_an_invented_peer_is_refused() -> None:
    states, sent = begin(4, AGREED, signers=SIGNERS)
    adverts = [secagg_server.read_keys(data, AGREED) for data in sent]
    pinned = pinned_by(SIGNERS[:4], 0)

    def refused(changed: list[Any], match: str) -> None:
        roster = secagg_server.roster_message(party_of(changed, AGREED))
        with pytest.raises(ProtocolError, match=match):
            secagg.share(states[0], roster, AGREED, pinned=pinned)

    invented = secagg.start(AGREED, name="site-7", signer=SIGNERS[7])[1]
    refused([*adverts, secagg_server.read_keys(invented, AGREED)], "only pinned peers")
    posing = secagg.start(AGREED, name="site-3", signer=SIGNERS[7])[1]
    refused([*adverts[:3], secagg_server.read_keys(posing, AGREED)], "didn't sign")
    unsigned = secagg.start(AGREED, name="site-3")[1]
    refused([*adverts[:3], secagg_server.read_keys(unsigned, AGREED)], "didn't sign")
    refused([*adverts[:3], adverts[3].model_copy(update={"mask": bytes(32)})], "didn't sign")
    earlier = secagg.start(terms(2), name="site-3", signer=SIGNERS[3])[1]
    of_round_2 = secagg_server.read_keys(earlier, terms(2))
    refused([*adverts[:3], of_round_2], "didn't sign")
    twice = secagg.start(AGREED, name="site-3", signer=SIGNERS[3])[1]
    refused([*adverts, secagg_server.read_keys(twice, AGREED)], "one name")
    # Who pins nobody takes part with anybody: then the server must be honest.
    roster = secagg_server.roster_message(party_of([*adverts, of_round_2], AGREED))
    secagg.share(states[0], roster, AGREED)


def test_survivors_must_be_signed_by_enough_pinned_sites() -> None:
    party, states, data = to_stage("confirmed", signers=SIGNERS[:4])
    pinned = pinned_by(SIGNERS[:4], 0)
    parts = signed_list(party, range(4))

    def asked(survivors: list[int], signatures: dict[int, bytes]) -> bytes:
        listed = [[index, signature.hex()] for index, signature in signatures.items()]
        return edited(data["unmask"], survivors=survivors, signatures=listed)

    good = {i: sign(SIGNERS[i], CONFIRM, *parts) for i in range(4)}
    forged = {i: sign(SIGNERS[7], CONFIRM, *parts) for i in range(4)}
    other = {i: sign(SIGNERS[i], CONFIRM, *signed_list(party, (0, 1, 2))) for i in range(4)}
    for bad in (
        {},
        {1: good[1]},
        {0: good[0], 1: good[1]},
        forged,
        other,
        {1: good[1], 2: good[1]},
    ):
        with pytest.raises(TooFewSites, match="signed"):
            secagg.reveal(states[0], asked([0, 1, 2, 3], bad), AGREED, pinned=pinned)
    with pytest.raises(ProtocolError, match="other survivors"):
        secagg.reveal(states[0], asked([0, 1, 2], other), AGREED, pinned=pinned)
    secagg.reveal(states[0], asked([0, 1, 2, 3], {1: good[1], 2: good[2]}), AGREED, pinned=pinned)
    # Without the confirmation nothing is revealed, and a second list isn't signed.
    _, masked, more = to_stage("masked", signers=SIGNERS[:4])
    with pytest.raises(ProtocolError, match="after stage masked"):
        secagg.reveal(masked[0], more["unmask"], AGREED, pinned=pinned)
    with pytest.raises(ProtocolError, match="after stage confirmed"):
        secagg.confirm(states[0], data["confirm"], AGREED, signer=SIGNERS[0])
    with pytest.raises(ProtocolError, match="signing key"):
        secagg.confirm(masked[0], more["confirm"], AGREED, signer=None)


STEPS: dict[str, Callable[[State, bytes], object]] = {
    "keys": lambda state, data: secagg.share(state, data, AGREED),
    "shares": lambda state, data: secagg.receive(state, data, AGREED),
    "received": lambda state, data: secagg.mask(state, AGREED, np.zeros(8, np.uint32)),
    "masked": lambda state, data: secagg.confirm(state, data, AGREED, signer=SIGNERS[0]),
    "confirmed": lambda state, data: secagg.reveal(state, data, AGREED),
}
MESSAGE_OF = {"keys": "roster", "shares": "inbox", "masked": "confirm", "confirmed": "unmask"}


@pytest.mark.parametrize("stage", STEPS)
def test_steps_come_in_one_order_and_once(stage: str) -> None:
    _, states, data = to_stage(stage, signers=SIGNERS[:4])
    for other, step in STEPS.items():
        if other == stage or (stage, other) == ("masked", "confirmed"):  # unpinned: no confirming
            continue
        for message in data.values():
            with pytest.raises(ProtocolError, match="after stage"):
                step(states[0], message)
    for name, message in data.items():
        if stage in MESSAGE_OF and name != MESSAGE_OF[stage]:
            with pytest.raises(ProtocolError):
                STEPS[stage](states[0], message)


@pytest.mark.parametrize("stage", MESSAGE_OF)
def test_messages_of_other_runs_and_rounds_are_refused(stage: str) -> None:
    _, states, data = to_stage(stage, signers=SIGNERS[:4])
    good = data[MESSAGE_OF[stage]]
    for changed in (
        *({"run": "run-2"}, {"round": 2}, {"round": True}, {"stage": "other"}),
        *({"purpose": "evaluate"}, {"purpose": "other"}, {"x": 1}),
    ):
        with pytest.raises(ProtocolError):
            STEPS[stage](states[0], edited(good, **changed))
    for key in json.loads(good):
        short = {k: v for k, v in json.loads(good).items() if k != key}
        if key != "signatures":
            with pytest.raises(ProtocolError):
                STEPS[stage](states[0], json.dumps(short).encode())
    STEPS[stage](states[0], good)


def test_a_round_is_not_done_twice() -> None:
    words = [np.zeros(8, np.uint32)] * 3
    done = run_round(words, terms(5))
    for number in (5, 4, 1):
        with pytest.raises(ProtocolError, match="again"):
            secagg.start(terms(number), name="a", before=done.states[0])
    secagg.start(terms(6), name="a", before=done.states[0])
    secagg.start(terms(1, run="other"), name="a", before=done.states[0])


def test_a_site_that_was_shown_another_roster_cannot_read_shares() -> None:
    states, sent = begin(4, AGREED)
    adverts = [secagg_server.read_keys(data, AGREED) for data in sent]
    extra = secagg_server.read_keys(secagg.start(AGREED, name="")[1], AGREED)
    parties = [party_of(adverts, AGREED), party_of([*adverts, extra], AGREED)]
    sealed = {}
    for i in range(4):
        shown = parties[i == 3]
        states[i], data = secagg.share(states[i], secagg_server.roster_message(shown), AGREED)
        sealed[i] = secagg_server.read_shares(data, shown, i)
    with pytest.raises(ProtocolError, match="encrypted for this round"):
        inbox = secagg_server.inbox_message(parties[0], 0, sealed)
        secagg.receive(states[0], inbox, AGREED)


def test_sites_with_other_terms_are_in_no_sum() -> None:
    for changed in ({"clip": 0.25}, {"share": 0.7}, {"max_weight": 7.0}):
        states, sent = begin(3, AGREED)
        adverts = [secagg_server.read_keys(data, AGREED) for data in sent]
        party = party_of(adverts, AGREED)
        roster = secagg_server.roster_message(party)
        theirs = [AGREED, AGREED, terms(**changed)]
        sealed = {}
        for i, own in enumerate(theirs):
            states[i], data = secagg.share(states[i], roster, own)
            sealed[i] = secagg_server.read_shares(data, party, i)
        with pytest.raises(ProtocolError, match="encrypted for this round"):
            secagg.receive(states[0], secagg_server.inbox_message(party, 0, sealed), AGREED)


def test_rosters_that_cannot_be_are_refused() -> None:
    states, sent = begin(4, AGREED)
    adverts = [secagg_server.read_keys(data, AGREED) for data in sent]
    good = json.loads(secagg_server.roster_message(party_of(adverts, AGREED)))
    low_order = {**good["adverts"][3], "channel": "00" * 32, "mask": "01" + "00" * 31}
    for bad, match in (
        (good["adverts"][1:], "own keys"),
        ([*good["adverts"], good["adverts"][0]], "own keys"),
        ([*good["adverts"], good["adverts"][1]], "twice"),
        (good["adverts"][:2], "adverts"),
        ([*good["adverts"][:3], low_order], "low order"),
    ):
        roster = json.dumps({**good, "adverts": bad}).encode()
        with pytest.raises(ProtocolError, match=match):
            secagg.share(states[0], roster, AGREED)
    roster = json.dumps(good).encode()
    with pytest.raises(TooFewSites, match="at least 5"):
        secagg.share(states[0], roster, AGREED, least=5)


def test_the_server_refuses_what_sites_cannot_send() -> None:
    party, states, data = to_stage("shares")
    total = secagg_server.RunningSum(words=np.zeros(8, np.uint32))
    state = secagg.receive(states[0], data["inbox"], AGREED)
    words = np.zeros(8, np.uint32)
    state, upload = secagg.mask(state, AGREED, words)
    for bad in (words[:7], words.astype(np.int64), words.reshape(2, 4), words.view(np.int32)):
        with pytest.raises(ProtocolError, match="upload"):
            secagg_server.add_upload(total, upload, party, 0, bad)
    secagg_server.add_upload(total, upload, party, 0, words)
    with pytest.raises(ProtocolError, match="twice"):
        secagg_server.add_upload(total, upload, party, 0, words)
    with pytest.raises(TooFewSites):
        secagg_server.unmask_message(party, total.sites)
    _, revealed = secagg.reveal(state, secagg_server.unmask_message(party, range(4)), AGREED)
    with pytest.raises(ProtocolError, match="other sites"):
        secagg_server.read_revealed(revealed, party, 0, [0, 1, 2])
    fewer = edited(revealed, shares=json.loads(revealed)["shares"][1:])
    with pytest.raises(ProtocolError, match="other sites"):
        secagg_server.read_revealed(fewer, party, 0, range(4))
