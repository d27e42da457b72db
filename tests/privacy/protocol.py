"""A whole round of secure aggregation in this process; sites drop out where a test says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseg.privacy import secagg, secagg_server
from fedseg.privacy.fixed_point import (
    LIMBS,
    Encoding,
    decode_numbers,
    decode_values,
    effective_weight,
    encode_numbers,
    encode_values,
)
from fedseg.privacy.roster import Party, Terms, party_of
from fedseg.privacy.secagg_masks import Words
from fedseg.privacy.secagg_server import RunningSum
from fedseg.privacy.secagg_state import State

STAGES = ("keys", "shares", "upload", "confirm", "unmask")
"""A site that drops out at a stage gives no answer to it, nor to any after."""


def terms(number: int = 1, **changed: object) -> Terms:
    given = {"run": "run-1", "round": number, "share": 0.6, "clip": 0.5, "max_weight": 100.0}
    return Terms(**{**given, **changed})  # type: ignore[arg-type]


@dataclass
class Round:
    """What a round left: for tests to look at."""

    party: Party
    states: dict[int, State]
    received: dict[int, State] = field(default_factory=dict)
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    uploads: dict[int, Words] = field(default_factory=dict)
    plain: dict[int, Words] = field(default_factory=dict)
    revealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    total: RunningSum = field(default_factory=lambda: RunningSum(words=np.zeros(0, np.uint32)))
    bytes_up: int = 0
    bytes_down: int = 0


def begin(
    count: int,
    agreed: Terms,
    *,
    signers: Sequence[Ed25519PrivateKey] | None = None,
    before: Mapping[int, State] | None = None,
) -> tuple[list[State], list[bytes]]:
    pairs = [
        secagg.start(
            agreed,
            name=f"site-{i}",
            signer=signers[i] if signers else None,
            before=before.get(i) if before else None,
        )
        for i in range(count)
    ]
    return [state for state, _ in pairs], [data for _, data in pairs]


def pinned_by(signers: Sequence[Ed25519PrivateKey] | None, own: int) -> secagg.Pinned | None:
    if signers is None:
        return None
    return {f"site-{i}": s.public_key() for i, s in enumerate(signers) if i != own}


def run_round(
    words: Sequence[Words],
    agreed: Terms,
    *,
    drop: Mapping[int, str] | None = None,
    signers: Sequence[Ed25519PrivateKey] | None = None,
    before: Mapping[int, State] | None = None,
) -> Round:
    """Run all stages. `words` are by site; the result's indices are those of the roster.

    Raises:
        ProtocolError: As the server's steps raise it.
    """
    at = {site: STAGES.index(stage) for site, stage in (drop or {}).items()}

    def there(site: int, stage: str) -> bool:
        return at.get(site, len(STAGES)) > STAGES.index(stage)

    states, sent = begin(len(words), agreed, signers=signers, before=before)
    sites = [i for i in range(len(words)) if there(i, "keys")]
    party = party_of([secagg_server.read_keys(sent[i], agreed) for i in sites], agreed)
    done = Round(party=party, states={k: states[i] for k, i in enumerate(sites)})
    roster = secagg_server.roster_message(party)
    done.bytes_up += sum(len(sent[i]) for i in sites)
    done.bytes_down += len(roster) * len(sites)
    for k, i in enumerate(sites):
        if there(i, "shares"):
            done.states[k], data = secagg.share(
                done.states[k], roster, agreed, pinned=pinned_by(signers, i)
            )
            done.bytes_up += len(data)
            done.sealed[k] = secagg_server.read_shares(data, party, k)
    done.total = RunningSum(words=np.zeros(len(words[0]), np.uint32))
    for k, i in enumerate(sites):
        if there(i, "upload"):
            inbox = secagg_server.inbox_message(party, k, done.sealed)
            done.bytes_down += len(inbox)
            state = State.from_json(secagg.receive(done.states[k], inbox, agreed).to_json())
            done.received[k] = state
            done.plain[k], done.uploads[k] = words[i].copy(), words[i].copy()
            done.states[k], data = secagg.mask(state, agreed, done.uploads[k])
            done.bytes_up += len(data) + done.uploads[k].nbytes
            secagg_server.add_upload(done.total, data, party, k, done.uploads[k])
    _unmask(done, agreed, sites, there, signers)
    return done


def _unmask(
    done: Round,
    agreed: Terms,
    sites: Sequence[int],
    there: object,
    signers: Sequence[Ed25519PrivateKey] | None,
) -> None:
    survivors, party = sorted(done.total.sites), done.party
    signatures: dict[int, bytes] | None = None
    if party.signed:
        signatures = {}
        asked = secagg_server.confirm_message(party, survivors)
        for k in survivors:
            if there(sites[k], "confirm"):  # type: ignore[operator]
                done.states[k], data = secagg.confirm(
                    done.states[k], asked, agreed, signer=signers[sites[k]] if signers else None
                )
                signatures[k] = secagg_server.read_confirmation(data, party)
                done.bytes_up += len(data)
                done.bytes_down += len(asked)
    asked = secagg_server.unmask_message(party, survivors, signatures)
    for k in survivors:
        if there(sites[k], "unmask"):  # type: ignore[operator]
            done.states[k], data = secagg.reveal(
                done.states[k], asked, agreed, pinned=pinned_by(signers, sites[k])
            )
            done.bytes_up += len(data)
            done.bytes_down += len(asked)
            done.revealed[k] = secagg_server.read_revealed(data, party, k, done.sealed)
    secagg_server.unmask(done.total, party, done.sealed, done.revealed)


def encoded(
    values: np.ndarray, weight: float, agreed: Terms, count: int, *, seed: int = 0
) -> Words:
    """Values and then weight as words, as a site of `count` sends them."""
    encoding = Encoding(sites=count, clip=agreed.clip, max_weight=agreed.max_weight)
    out = np.empty(len(values) + LIMBS, np.uint32)
    exact = effective_weight(weight, encoding)
    rng = np.random.default_rng(seed)
    encode_values(values, exact, encoding, rng=rng, out=out[: len(values)])
    out[len(values) :] = encode_numbers([exact], encoding)
    return out


def decoded(done: Round, size: int) -> tuple[np.ndarray, float]:
    """Weighted mean and sum of weights of an unmasked round."""
    encoding, words = done.party.encoding, done.total.words
    sums = decode_numbers(words[size:], ["weight"], encoding, summands=len(done.total.sites))
    return decode_values(words[:size], sums["weight"], encoding), sums["weight"]
