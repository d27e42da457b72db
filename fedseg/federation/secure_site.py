"""A site's side of secure aggregation: its steps as answers to messages, with the state between.

The secrets of a round are one JSON in `context.state`, which stays at the node.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message

from fedseg.config import StudyConfig
from fedseg.data.node import Site, open_site
from fedseg.errors import ProtocolError, Reason, SiteError
from fedseg.federation.egress import Reply
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import PERSONAL, TRAIN_METRICS, Task, answer_message, protocol_data
from fedseg.privacy import secagg
from fedseg.privacy.clipping import clip_factor
from fedseg.privacy.fixed_point import LIMBS, effective_weight, encode_numbers, encode_values
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.identity import read_identity
from fedseg.privacy.policy import Departure, check_departure
from fedseg.privacy.roster import Terms
from fedseg.privacy.secagg_masks import Words
from fedseg.privacy.secagg_state import State
from fedseg.privacy.secagg_wire import Begin, Purpose, unpack
from fedseg.privacy.sent_once import check_unsent, note_sending, note_step
from fedseg.privacy.words_checksum import checksum
from fedseg.registry import resolve
from fedseg.segmentation.metrics import empty_sums

__all__ = [
    "COMPARED",
    "SECURE_STEPS",
    "SUMMED",
    "WORDS",
    "masked_answer",
    "masked_sums",
    "received",
    "terms_of",
]

COMPARED = PERSONAL + "compared"
"""1 for a site that has a model of its own to compare."""

SUMMED: dict[Purpose, tuple[str, ...]] = {
    "train": ("weight", *TRAIN_METRICS, "clipped"),
    "evaluate": tuple(empty_sums()),
    "final": (*(PERSONAL + key for key in empty_sums()), PERSONAL + "kept", COMPARED),
}
"""Numbers in the masked words by what these are for; `clipped` counts values. The final words say
nothing about the global model: it was scored before, and twice over different sites would show a
site's own."""

WORDS = "words"

Step = tuple[State, bytes]
"""State after a step, and its answer."""

_STATE = "secagg"
_ROUNDING = 23
"""Keeps the draws of rounding apart from other uses of the seed."""


def terms_of(study: StudyConfig, run: str, number: int, purpose: Purpose) -> Terms:
    """Terms of a round; each side takes them from its own study config."""
    privacy = study.privacy
    return Terms(
        run=run,
        round=number,
        purpose=purpose,
        share=privacy.secagg_threshold,
        clip=privacy.secagg_clip,
        max_weight=1.0 if study.federation.weighting == "equal" else privacy.secagg_max_weight,
    )


def _terms(message: Message, study: StudyConfig, purpose: Purpose) -> Terms:
    task = Task.from_message(message)
    if task.config_digest != study.digest() or not study.privacy.secure_aggregation:
        raise SiteError(Reason.CONFIG_MISMATCH)
    return terms_of(study, task.study_run, task.round_number, purpose)


def _load(context: Context) -> State | None:
    """State of this Flower run; what a site sent in an earlier one is on disk."""
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


def _keys(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    signer, _ = read_identity(site.config)
    task = Task.from_message(message)
    stamp = {"run": task.study_run, "round": task.round_number}
    terms = _terms(message, study, unpack(Begin, protocol_data(message), stamp).purpose)
    check_unsent(site.config.cache, site.name, terms)
    state, data = secagg.start(terms, name=site.name, signer=signer, before=_load(context))
    return _answer(message, context, state, data)


def _answer_once(
    message: Message, context: Context, site: Site, terms: Terms, before: State, found: Step
) -> Message:
    """Answer a step, unless another process has answered it from the same state."""
    after, data = found
    key = before.adverts[max(before.index, 0)].mask
    note_step(site.config.cache, site.name, terms, after.stage, key)
    return _answer(message, context, after, data)


def _shares(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    _, pinned = read_identity(site.config)
    state = _loaded(context)
    terms = _terms(message, study, state.purpose)
    found = secagg.share(
        state,
        protocol_data(message),
        terms,
        pinned=pinned,
        least=max(LEAST_SITES, study.federation.min_sites),
    )
    if len(found[0].adverts) <= site.config.policy.min_peers:  # here they can be counted
        raise SiteError(Reason.POLICY_MIN_PEERS)
    return _answer_once(message, context, site, terms, state, found)


def _confirm(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    signer, _ = read_identity(site.config)
    state = _loaded(context)
    terms = _terms(message, study, state.purpose)
    found = secagg.confirm(state, protocol_data(message), terms, signer=signer)
    return _answer_once(message, context, site, terms, state, found)


def _unmask(message: Message, context: Context, study: StudyConfig) -> Message:
    site = open_site(context.node_config, study, make_phantoms=False)
    _, pinned = read_identity(site.config)
    state = _loaded(context)
    terms = _terms(message, study, state.purpose)
    found = secagg.reveal(state, protocol_data(message), terms, pinned=pinned)
    return _answer_once(message, context, site, terms, state, found)


def _forget(message: Message, context: Context, study: StudyConfig) -> Message:
    """Forget the secrets of a round that is over: failed, or without this site's shares."""
    task, state = Task.from_message(message), _load(context)
    if state is not None and (state.run, state.round) == (task.study_run, task.round_number):
        _save(context, secagg.forgotten(state))
    return answer_message(message, status="ok")


SECURE_STEPS: dict[str, Callable[[Message, Context, StudyConfig], Message]] = {
    "secagg_keys": _keys,
    "secagg_shares": _shares,
    "secagg_confirm": _confirm,
    "secagg_unmask": _unmask,
    "secagg_forget": _forget,
}
"""Action of the query to the step that answers it; masked words answer `train` and `evaluate`."""


def received(
    message: Message, context: Context, study: StudyConfig, purpose: Purpose
) -> State | None:
    """Take the neighbours' shares that come with the message; None without the protocol.

    Raises:
        ProtocolError: They are no good: nothing is computed in vain.
    """
    if not study.privacy.secure_aggregation:
        return None
    terms = _terms(message, study, purpose)
    return secagg.receive(_loaded(context), protocol_data(message), terms)


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
    _judge(site, study, "train", metrics)
    terms = _terms(message, study, "train")
    encoding = secagg.party(state, terms).encoding
    values = flatten(update, layout_of(update)).numpy()
    norm = _bound_norm(values, study.privacy.secagg_max_norm)
    weigh = resolve("federation.weighting", study.federation.weighting, WEIGHTINGS)
    weight = effective_weight(float(weigh(metrics)), encoding)
    keys = SUMMED["train"]
    words = np.empty(len(values) + LIMBS * len(keys), np.uint32)
    rng = np.random.default_rng([study.train.seed, terms.round, _ROUNDING, *site.name.encode()])
    clipped = encode_values(values, weight, encoding, rng=rng, out=words[: len(values)])
    numbers = {**metrics, "weight": weight, "clipped": float(clipped)}
    words[len(values) :] = encode_numbers([numbers[key] for key in keys], encoding)
    notes = {
        "norm": norm,
        "clip": study.privacy.secagg_max_norm,
        "masked": {"numbers": numbers},
    }
    return _masked(message, context, site, state, terms, words, notes)


def masked_sums(
    message: Message,
    context: Context,
    study: StudyConfig,
    site: Site,
    state: State,
    sums: Mapping[str, float],
) -> Reply:
    """Encode and mask the numbers of an evaluation; nothing leaves but masked words."""
    terms = _terms(message, study, state.purpose)
    encoding = secagg.party(state, terms).encoding
    _judge(site, study, "evaluate", {k: sums[k] for k in SUMMED[state.purpose] if k in sums})
    known = {**sums, COMPARED: float(PERSONAL + "kept" in sums)}
    numbers = {key: known.get(key, 0.0) for key in SUMMED[state.purpose]}
    words = encode_numbers(list(numbers.values()), encoding)
    return _masked(message, context, site, state, terms, words, {"masked": {"numbers": numbers}})


def _judge(site: Site, study: StudyConfig, kind: str, numbers: Mapping[str, float]) -> None:
    """Judge numbers before they are masked: it is the study that chose the mask, not the site.

    Raises:
        SiteError: The site's policy doesn't let them leave.
    """
    check_departure(site.config.policy, Departure(kind=kind, study=study, metrics=dict(numbers)))


def _masked(
    message: Message,
    context: Context,
    site: Site,
    state: State,
    terms: Terms,
    words: Words,
    notes: dict[str, Any],
) -> Reply:
    party = secagg.party(state, terms)
    notes["masked"]["checksum"] = checksum(words, terms)
    notes["roster"] = {"sites": party.size, "sha256": party.digest.hex()}
    after, data = secagg.mask(state, terms, words)
    note_sending(site.config.cache, site.name, terms)
    _save(context, after)
    masked = {WORDS: torch.from_numpy(words)}
    answer = answer_message(message, status="ok", update=masked, protocol=data)
    return Reply(message=answer, notes=notes)


def _bound_norm(values: np.ndarray, most: float | None) -> float:
    """Scale an update down, in place, whose L2 norm is larger; return the norm it has then."""
    norm = math.sqrt(np.einsum("i,i->", values, values, dtype=np.float64))
    factor = 1.0 if most is None else clip_factor(norm, most)
    if factor < 1:
        values *= np.float32(factor)
    return factor * norm
