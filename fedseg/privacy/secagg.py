"""A site's steps of secure aggregation (Bonawitz et al., CCS 2017), as functions of a state.

A round, in the site's eyes; each step takes the last one's state and refuses any other order:

1. `start`: make fresh keys, tell the server the public ones.
2. `share`: see everybody's public keys; split the secret of the own mask key and that of the self
   mask among the neighbours, encrypted for each.
3. `receive`: take the neighbours' shares. Only who is among them gets a mask.
4. `mask`: add the self mask and, for each such neighbour, a mask that cancels against its own. The
   site's own secrets are forgotten with that.
5. `confirm`, only where peers' keys are pinned: sign whose words are in the sum.
6. `reveal`: for who is in the sum its share of the self mask, for who isn't that of the mask key;
   never both. All secrets are forgotten with that.

The state is small JSON (`secagg_state.State`) that the runtime keeps between messages.

Who is trusted for what: without pinned keys the server must be honest, if curious; it can make up
sites. With them a server that lies about keys or survivors is found out, as long as fewer than
2 t - n sites help it, with t the threshold of n sites.
"""

import secrets
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedseg.errors import ProtocolError, TooFewSites
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.roster import (
    CONFIRM,
    KEYS,
    Party,
    Terms,
    advert_parts,
    check_pinned,
    check_survivors,
    party_of,
    signed_list,
)
from fedseg.privacy.secagg_keys import (
    SECRET_BYTES,
    channel_key,
    commitment,
    is_signed,
    mask_key,
    open_sealed,
    public_key,
    seal,
    self_mask_key,
    sign,
    split_secret,
)
from fedseg.privacy.secagg_masks import Words, add_mask
from fedseg.privacy.secagg_state import Held, State
from fedseg.privacy.secagg_wire import (
    Advert,
    Confirmation,
    Confirming,
    Inbox,
    Keys,
    Revealed,
    Roster,
    Shares,
    Unmasking,
    Uploaded,
    pack,
    unpack,
)

__all__ = [
    "Pinned",
    "confirm",
    "forgotten",
    "mask",
    "party",
    "receive",
    "reveal",
    "share",
    "start",
]

Pinned = Mapping[str, Ed25519PublicKey]
"""Public keys of the peers a site knows, by their names."""


def start(
    terms: Terms, *, name: str, signer: Ed25519PrivateKey | None = None, before: State | None = None
) -> tuple[State, bytes]:
    """Begin a round with fresh keys.

    Args:
        terms: The terms.
        name: The site's own name.
        signer: Its signing key, where it has one.
        before: State of the round before.

    Raises:
        ProtocolError: The site took part in this round or a later one already: two sums of one
            round over different sites would show what is between them.
    """
    place = State(**terms.stamp, stage="keys").place
    if before is not None and before.run == terms.run and place <= before.place:
        raise ProtocolError(
            f"got round {terms.round} ({terms.purpose}) again; expected one after "
            f"{before.round} ({before.purpose})"
        )
    channel, own_mask, self_mask = (secrets.token_bytes(SECRET_BYTES) for _ in range(3))
    advert = Advert(
        name=name,
        channel=public_key(channel),
        mask=public_key(own_mask),
        commitment=commitment(self_mask),
    )
    if signer is not None:
        signature = sign(signer, KEYS, *advert_parts(advert, terms))
        advert = advert.model_copy(update={"signature": signature})
    state = State(
        **terms.stamp,
        stage="keys",
        channel=channel,
        mask=own_mask,
        self_mask=self_mask,
        adverts=(advert,),
    )
    return state, pack(Keys(**terms.stamp, advert=advert))


def share(
    state: State,
    data: object,
    terms: Terms,
    *,
    pinned: Pinned | None = None,
    least: int = LEAST_SITES,
) -> tuple[State, bytes]:
    """Answer the roster with shares for each neighbour.

    Args:
        state: After `start`.
        data: A `Roster`.
        terms: The terms.
        pinned: Peers' keys; None where none are pinned.
        least: Fewest sites with which this site takes part.

    Raises:
        ProtocolError: The roster lacks this site, or has one that isn't pinned.
        TooFewSites: It has too few sites.
    """
    _check_turn(state, terms, "keys")
    roster = unpack(Roster, data, terms.stamp)
    if roster.adverts.count(state.adverts[0]) != 1:
        raise ProtocolError("roster: expected this site's own keys in it, once")
    if len(roster.adverts) < least:
        raise TooFewSites(f"roster: got {len(roster.adverts)} sites; expected at least {least}")
    own = roster.adverts.index(state.adverts[0])
    found = party_of(roster.adverts, terms)
    if pinned is not None:
        check_pinned(found, own, pinned)
    holders, needed = found.holders(own), found.needed(own)
    split = [
        split_secret(secret, holders=len(holders), needed=needed)
        for secret in (state.self_mask, state.mask)
    ]
    shares = dict(zip(holders, zip(*split, strict=True), strict=True))
    sealed = tuple(
        (peer, seal(_channel(state, found, own, own, peer), shares[peer], found.digest))
        for peer in found.neighbours[own]
    )
    kept = Held(self_mask=shares[own][0], mask=shares[own][1])
    state = state.model_copy(
        update={"stage": "shares", "adverts": found.adverts, "index": own, "held": {own: kept}}
    )
    return state, pack(Shares(**terms.stamp, sealed=sealed))


def _channel(state: State, found: Party, own: int, sender: int, to: int) -> bytes:
    peer = found.adverts[to if sender == own else sender].channel
    return channel_key(state.channel, peer, found.digest, sender=sender, to=to)


def party(state: State, terms: Terms) -> Party:
    """Work out the round from the state: `encoding` there says how to make words."""
    return party_of(state.adverts, terms)


def receive(state: State, data: object, terms: Terms) -> State:
    """Take the neighbours' shares.

    Raises:
        ProtocolError: A share is from a site that is no neighbour, comes twice, or wasn't encrypted
            by its sender for this site in this round.
        TooFewSites: Too few neighbours are left to restore this site's secrets.
    """
    _check_turn(state, terms, "shares")
    inbox = unpack(Inbox, data, terms.stamp)
    found, own = party(state, terms), state.index
    senders = [sender for sender, _ in inbox.sealed]
    if len(set(senders)) < len(senders) or not set(senders) <= set(found.neighbours[own]):
        raise ProtocolError("inbox: got shares twice or of a site that is no neighbour")
    if len(senders) + 1 < found.needed(own):
        raise TooFewSites(
            f"inbox: got shares of {len(senders)} neighbours; expected at least "
            f"{found.needed(own) - 1}"
        )
    held = dict(state.held)
    for sender, sealed in inbox.sealed:
        key = _channel(state, found, own, sender, own)
        self_mask, peer_mask = open_sealed(key, sealed, found.digest)
        held[sender] = Held(self_mask=self_mask, mask=peer_mask)
    return state.model_copy(update={"stage": "received", "held": held, "channel": b""})


def mask(state: State, terms: Terms, words: Words) -> tuple[State, bytes]:
    """Mask words in place: uint32 `[W]`; then they may leave.

    Raises:
        ProtocolError: It isn't the turn for it: words of a round are masked once.
    """
    _check_turn(state, terms, "received")
    found, own = party(state, terms), state.index
    add_mask(words, self_mask_key(state.self_mask, found.digest))
    for peer in sorted(set(state.held) - {own}):
        key = mask_key(state.mask, found.adverts[peer].mask, found.digest)
        add_mask(words, key, subtract=own > peer)
    state = state.model_copy(update={"stage": "masked", "mask": b"", "self_mask": b""})
    return state, pack(Uploaded(**terms.stamp))


def confirm(
    state: State, data: object, terms: Terms, *, signer: Ed25519PrivateKey | None
) -> tuple[State, bytes]:
    """Sign the list of survivors; one list a round.

    Raises:
        ProtocolError: The list can't be, or this site has no signing key.
        TooFewSites: It is below the threshold.
    """
    _check_turn(state, terms, "masked")
    survivors = unpack(Confirming, data, terms.stamp).survivors
    found = party(state, terms)
    _check_list(state, found, survivors)
    if signer is None:
        raise ProtocolError("confirm: this site has no signing key; set signing-key in site.toml")
    signature = sign(signer, CONFIRM, *signed_list(found, survivors))
    state = state.model_copy(update={"stage": "confirmed", "survivors": survivors})
    return state, pack(Confirmation(**terms.stamp, signature=signature))


def reveal(
    state: State, data: object, terms: Terms, *, pinned: Pinned | None = None
) -> tuple[State, bytes]:
    """Reveal one share of each neighbour, and forget the round's secrets.

    Raises:
        ProtocolError: The survivors can't be, aren't those that were confirmed, or, with pinned
            keys, aren't signed by enough sites.
        TooFewSites: They are below the threshold.
    """
    _check_turn(state, terms, *(("confirmed",) if pinned is not None else ("masked", "confirmed")))
    asked = unpack(Unmasking, data, terms.stamp)
    found = party(state, terms)
    _check_list(state, found, asked.survivors)
    if state.survivors is not None and state.survivors != asked.survivors:
        raise ProtocolError("unmask: got other survivors than this site confirmed")
    if pinned is not None:
        _check_signatures(state, found, asked, pinned)
    chosen = set(asked.survivors)
    shares = tuple(
        (index, held.self_mask if index in chosen else held.mask)
        for index, held in sorted(state.held.items())
    )
    return forgotten(state), pack(Revealed(**terms.stamp, shares=shares))


def forgotten(state: State) -> State:
    """Forget all secrets; what is left says only that the round was there."""
    return State(run=state.run, round=state.round, purpose=state.purpose, stage="done")


def _check_turn(state: State, terms: Terms, *stages: str) -> None:
    here = {"run": state.run, "round": state.round, "purpose": state.purpose}
    if here != terms.stamp or state.stage not in stages:
        raise ProtocolError(
            f"got a message for round {terms.round} ({terms.purpose}) after stage {state.stage} of "
            f"round {state.round} ({state.purpose}); expected stage {' or '.join(stages)} of one "
            "round"
        )


def _check_list(state: State, found: Party, survivors: tuple[int, ...]) -> None:
    check_survivors(found, survivors)
    if state.index not in survivors:
        raise ProtocolError("survivors: expected this site, which is asked, among them")
    if not set(survivors) & set(found.neighbours[state.index]) <= set(state.held):
        raise ProtocolError("survivors: got a neighbour that sent no shares")


def _check_signatures(state: State, found: Party, asked: Unmasking, pinned: Pinned) -> None:
    parts = signed_list(found, asked.survivors)
    good = {state.index}
    for index, signature in asked.signatures:
        peer = found.adverts[index] if index < found.size else None
        key = pinned.get(peer.name) if peer else None
        if index != state.index and key and is_signed(key, signature, CONFIRM, *parts):
            good.add(index)
    if len(good & set(asked.survivors)) < found.threshold:
        raise TooFewSites(
            f"unmask: {len(good)} sites signed the survivors; expected at least {found.threshold}"
        )
