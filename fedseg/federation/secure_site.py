"""A site's side of secure aggregation: its steps as answers to messages, with the state between.

The secrets of a round are one JSON in `context.state`, which stays at the node.
"""

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from flwr.app import ConfigRecord, Context, Message

from fedseg.config import StudyConfig
from fedseg.data.node import Site, open_site
from fedseg.errors import ProtocolError, Reason, SiteError
from fedseg.federation.egress import Reply
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import TRAIN_METRICS, Task, answer_message, protocol_data
from fedseg.privacy import secagg
from fedseg.privacy.fixed_point import LIMBS, effective_weight, encode_numbers, encode_values
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.roster import Terms
from fedseg.privacy.secagg_state import State
from fedseg.privacy.words_checksum import checksum
from fedseg.registry import resolve

__all__ = ["SECURE_STEPS", "SUMMED", "WORDS", "forget", "masked_answer", "received", "terms_of"]

SUMMED = ("weight", *TRAIN_METRICS, "clipped")
"""Numbers that ride behind the values in the masked words; `clipped` counts values."""

WORDS = "words"

_STATE = "secagg"
_ROUNDING = 23
"""Keeps the draws of rounding apart from other uses of the seed."""


def terms_of(study: StudyConfig, run: str, number: int) -> Terms:
    """Terms of a round; each side takes them from its own study config."""
    privacy = study.privacy
    return Terms(
        run=run,
        round=number,
        share=privacy.secagg_threshold,
        clip=privacy.secagg_clip,
        max_weight=1.0 if study.federation.weighting == "equal" else privacy.secagg_max_weight,
    )


def _terms(message: Message, study: StudyConfig) -> Terms:
    task = Task.from_message(message)
    if task.config_digest != study.digest() or not study.privacy.secure_aggregation:
        raise SiteError(Reason.CONFIG_MISMATCH)
    return terms_of(study, task.study_run, task.round_number)


def _identity(site: Site) -> tuple[Ed25519PrivateKey | None, secagg.Pinned | None]:
    """Read the site's signing key and its peers' public keys.

    Raises:
        SiteError: One can't be read, or peers are pinned without an own key.
    """
    config = site.config
    try:
        signer = None if config.signing_key is None else _private_key(config.signing_key)
        pinned = None if config.peers is None else _public_keys(config.peers)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SiteError(
            Reason.SITE_CONFIG,
            f"signing-key or peers: got what isn't an Ed25519 key ({error}); expected a PEM file, "
            "and for each peer the base64 line of its public PEM",
        ) from None
    if pinned is not None and signer is None:
        raise SiteError(Reason.SITE_CONFIG, "peers: expected a signing-key, too")
    return signer, pinned


def _private_key(path: str) -> Ed25519PrivateKey:
    key = load_pem_private_key(Path(path).expanduser().read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not Ed25519")
    return key


def _public_keys(peers: Mapping[str, str]) -> dict[str, Ed25519PublicKey]:
    keys = {}
    for name, text in peers.items():
        try:
            key = load_der_public_key(base64.b64decode(text, validate=True))
        except binascii.Error:
            raise ValueError(f"{name}: not base64") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"{name}: not Ed25519")
        keys[name] = key
    return keys


def _load(context: Context) -> State | None:
    """State of this Flower run: a resumed study run does its round anew, with new keys."""
    record = context.state.config_records.get(_STATE, ConfigRecord())
    if record.get("flower-run") != str(context.run_id):
        return None
    return State.from_json(str(record.get("state")))


def _loaded(context: Context) -> State:
    state = _load(context)
    if state is None:
        raise ProtocolError("got a message out of turn; expected one for a round's keys first")
    return state


def _save(context: Context, state: State) -> None:
    context.state[_STATE] = ConfigRecord(
        {"flower-run": str(context.run_id), "state": state.to_json()}
    )


def _answer(message: Message, context: Context, state: State, data: bytes) -> Message:
    """Keep the state that a step ends with, and answer."""
    _save(context, state)
    return answer_message(message, status="ok", protocol=data)


def forget(context: Context, number: int) -> None:
    """Forget the secrets of a round that is over: failed, or without this site's shares."""
    state = _load(context)
    if state is not None and state.round <= number and state.stage != "done":
        _save(context, State(run=state.run, round=state.round, stage="done"))


def _keys(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    signer, _ = _identity(site)
    terms = _terms(message, study)
    state, data = secagg.start(terms, name=site.name, signer=signer, before=_load(context))
    return _answer(message, context, state, data)


def _shares(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    _, pinned = _identity(site)
    state, data = secagg.share(
        _loaded(context),
        protocol_data(message),
        _terms(message, study),
        pinned=pinned,
        least=max(LEAST_SITES, study.federation.min_sites),
    )
    if len(state.adverts) <= site.config.policy.min_peers:  # here they can be counted
        raise SiteError(Reason.POLICY_MIN_PEERS)
    return _answer(message, context, state, data)


def _confirm(message: Message, context: Context, study: StudyConfig) -> Message:
    signer, _ = _identity(open_site(context.node_config, study, make_phantoms=False))
    terms = _terms(message, study)
    state, data = secagg.confirm(_loaded(context), protocol_data(message), terms, signer=signer)
    return _answer(message, context, state, data)


def _unmask(message: Message, context: Context, study: StudyConfig) -> Message:
    _, pinned = _identity(open_site(context.node_config, study, make_phantoms=False))
    terms = _terms(message, study)
    state, data = secagg.reveal(_loaded(context), protocol_data(message), terms, pinned=pinned)
    return _answer(message, context, state, data)


SECURE_STEPS: dict[str, Callable[[Message, Context, StudyConfig], Message]] = {
    "secagg_keys": _keys,
    "secagg_shares": _shares,
    "secagg_confirm": _confirm,
    "secagg_unmask": _unmask,
}
"""Action of the query to the step that answers it; the masked words answer `train`."""


def received(message: Message, context: Context, study: StudyConfig) -> State | None:
    """Take the neighbours' shares that come with the train message; None without the protocol.

    Raises:
        ProtocolError: They are no good: nothing is trained in vain.
    """
    if not study.privacy.secure_aggregation:
        return None
    return secagg.receive(_loaded(context), protocol_data(message), _terms(message, study))


def masked_answer(
    message: Message,
    context: Context,
    study: StudyConfig,
    site: Site,
    state: State,
    update: Mapping[str, torch.Tensor],
    metrics: Mapping[str, float],
) -> Reply:
    """Bound, weigh, encode and mask an update and its numbers; nothing leaves but masked words."""
    terms = _terms(message, study)
    party = secagg.party(state, terms)
    encoding = party.encoding
    values = flatten(update, layout_of(update)).numpy()
    norm = _bound_norm(values, study.privacy.secagg_max_norm)
    weigh = resolve("federation.weighting", study.federation.weighting, WEIGHTINGS)
    weight = effective_weight(float(weigh(metrics)), encoding)
    words = np.empty(len(values) + LIMBS * len(SUMMED), np.uint32)
    rng = np.random.default_rng([study.train.seed, terms.round, _ROUNDING, *site.name.encode()])
    clipped = encode_values(values, weight, encoding, rng=rng, out=words[: len(values)])
    numbers = {**metrics, "weight": weight, "clipped": float(clipped)}
    words[len(values) :] = encode_numbers([numbers[key] for key in SUMMED], encoding)
    notes = {
        "norm": norm,
        "clip": study.privacy.secagg_max_norm,
        "masked": {"numbers": numbers, "checksum": checksum(words, terms)},
        "roster": {"sites": party.size, "sha256": party.digest.hex()},
    }
    after, data = secagg.mask(state, terms, words)
    _save(context, after)
    masked = {WORDS: torch.from_numpy(words)}
    answer = answer_message(message, status="ok", update=masked, protocol=data)
    return Reply(message=answer, notes=notes)


def _bound_norm(values: np.ndarray, most: float | None) -> float:
    """Scale an update down, in place, whose L2 norm is larger; return the norm it has then."""
    norm = math.sqrt(np.einsum("i,i->", values, values, dtype=np.float64))
    if most is None or norm <= most:
        return norm
    values *= np.float32(most / norm)
    return most
