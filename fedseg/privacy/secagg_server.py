"""The server's steps of secure aggregation: pass keys and shares on, add up, unmask the sum.

It holds one sum of words, whatever the number of sites; a site's words are added as they come and
forgotten. Sites are known by their index in the round's `Party`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedseg.errors import ProtocolError, TooFewSites
from fedseg.privacy.roster import Party, Terms, check_survivors
from fedseg.privacy.secagg_keys import (
    commitment,
    join_secret,
    mask_key,
    public_key,
    self_mask_key,
)
from fedseg.privacy.secagg_masks import Words, add_mask
from fedseg.privacy.secagg_wire import (
    Advert,
    Begin,
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
    "RunningSum",
    "add_upload",
    "begin_message",
    "confirm_message",
    "inbox_message",
    "read_confirmation",
    "read_keys",
    "read_revealed",
    "read_shares",
    "roster_message",
    "unmask",
    "unmask_message",
]


@dataclass(kw_only=True)
class RunningSum:
    """All that the server has of the sites' updates.

    Attributes:
        words: Their sum, still masked, uint32 `[W]`.
        sites: Indices of those that are in it.
    """

    words: Words
    sites: set[int] = field(default_factory=set)


def begin_message(terms: Terms) -> bytes:
    """Ask sites for their public keys."""
    return pack(Begin(**terms.stamp))


def read_keys(data: object, terms: Terms) -> Advert:
    """Read a site's public keys.

    Raises:
        ProtocolError: The message is no good.
    """
    return unpack(Keys, data, terms.stamp).advert


def roster_message(party: Party) -> bytes:
    """All public keys, for every site."""
    return pack(Roster(**party.terms.stamp, adverts=party.adverts))


def read_shares(data: object, party: Party, index: int) -> dict[int, bytes]:
    """Read what a site encrypted for each of its neighbours.

    Raises:
        ProtocolError: A neighbour is missing, or there is one more.
    """
    found = unpack(Shares, data, party.terms.stamp).sealed
    if tuple(sorted(to for to, _ in found)) != party.neighbours[index]:
        raise ProtocolError("shares: expected one pair for each neighbour")
    return dict(found)


def inbox_message(party: Party, index: int, sealed: Mapping[int, Mapping[int, bytes]]) -> bytes:
    """What a site's neighbours encrypted for it.

    Args:
        party: The round.
        index: The site.
        sealed: For each site that sent shares what it sent, by receiver.
    """
    mine = tuple((peer, sealed[peer][index]) for peer in party.neighbours[index] if peer in sealed)
    return pack(Inbox(**party.terms.stamp, sealed=mine))


def add_upload(total: RunningSum, data: object, party: Party, index: int, words: Words) -> None:
    """Add a site's masked words to the sum, once.

    Raises:
        ProtocolError: They are of another round, of another length, or come twice.
    """
    unpack(Uploaded, data, party.terms.stamp)
    if index in total.sites or words.dtype != np.uint32 or words.shape != total.words.shape:
        raise ProtocolError("upload: got words twice, or of another number or type")
    np.add(total.words, words, out=total.words)
    total.sites.add(index)


def confirm_message(party: Party, survivors: Collection[int]) -> bytes:
    """Ask a site to sign the survivors.

    Raises:
        TooFewSites: They are below the threshold.
    """
    chosen = _checked(party, survivors)
    return pack(Confirming(**party.terms.stamp, survivors=chosen))


def read_confirmation(data: object, party: Party) -> bytes:
    """Read a site's signature over the survivors.

    Raises:
        ProtocolError: The message is no good.
    """
    return unpack(Confirmation, data, party.terms.stamp).signature


def unmask_message(
    party: Party, survivors: Collection[int], signatures: Mapping[int, bytes] | None = None
) -> bytes:
    """Ask a survivor for its shares.

    Raises:
        TooFewSites: The survivors, or their signatures where there are any, are too few.
    """
    chosen, signed = _checked(party, survivors), tuple(sorted((signatures or {}).items()))
    if signatures is not None and len(signed) < party.threshold:
        raise TooFewSites(
            f"secure aggregation: {len(signed)} of {party.size} sites confirmed the survivors; "
            f"expected at least {party.threshold}"
        )
    return pack(Unmasking(**party.terms.stamp, survivors=chosen, signatures=signed))


def _checked(party: Party, survivors: Collection[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(survivors))
    check_survivors(party, chosen)
    return chosen


def read_revealed(
    data: object, party: Party, index: int, sharers: Collection[int]
) -> dict[int, bytes]:
    """Read the shares that a site reveals, by whose secret they are of.

    Args:
        data: The message.
        party: The round.
        index: The site that revealed them.
        sharers: Sites that sent shares.

    Raises:
        ProtocolError: They aren't just those that the site holds.
    """
    found = unpack(Revealed, data, party.terms.stamp).shares
    if [of for of, _ in found] != [of for of in party.holders(index) if of in sharers]:
        raise ProtocolError("reveal: got shares of other sites than this one holds")
    return dict(found)


def unmask(
    total: RunningSum,
    party: Party,
    sharers: Collection[int],
    revealed: Mapping[int, Mapping[int, bytes]],
) -> None:
    """Take all masks off the sum, in place.

    A secret is checked against the public key or the commitment that it belongs to, so that a
    wrong share gives an error and never a wrong sum.

    Args:
        total: The sum; its sites are the survivors.
        party: The round.
        sharers: Sites that sent shares: with these the survivors masked.
        revealed: For each site that answered the shares it revealed.

    Raises:
        TooFewSites: The survivors are below the threshold, or too few shares of a secret came.
        ProtocolError: A share is wrong. The sum is of no use then.
    """
    _checked(party, total.sites)
    # All secrets first: nothing is taken off a sum that can't be unmasked.
    restored = {
        index: _secret(party, index, revealed, dropped=index not in total.sites)
        for index in sorted(sharers)
        if index in total.sites or set(party.neighbours[index]) & total.sites
    }
    for index, secret in restored.items():
        if index in total.sites:
            add_mask(total.words, self_mask_key(secret, party.digest), subtract=True)
            continue
        for peer in sorted(set(party.neighbours[index]) & total.sites):
            key = mask_key(secret, party.adverts[peer].mask, party.digest)
            add_mask(total.words, key, subtract=peer < index)


def _secret(
    party: Party, index: int, revealed: Mapping[int, Mapping[int, bytes]], *, dropped: bool
) -> bytes:
    """Restore the mask key of a site that dropped out, or the self mask of one that didn't."""
    holders, needed = party.holders(index), party.needed(index)
    shares = {
        place: revealed[holder][index]
        for place, holder in enumerate(holders)
        if index in revealed.get(holder, {})
    }
    if len(shares) < needed:
        raise TooFewSites(
            f"secure aggregation: {len(shares)} of {len(holders)} shares of a site's secret came; "
            f"expected at least {needed} (privacy.secagg-threshold)"
        )
    secret = join_secret(shares, needed=needed)
    advert = party.adverts[index]
    good = public_key(secret) == advert.mask if dropped else commitment(secret) == advert.commitment
    if not good:
        raise ProtocolError("reveal: got a wrong share; expected those that the sites were sent")
    return secret
