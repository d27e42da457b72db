"""What a site sends under secure aggregation: an update or the numbers of an evaluation, masked."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from fedseg.config import StudyConfig
from fedseg.data.sites import Site
from fedseg.federation.egress import Reply
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.secure_site import save_state, task_terms
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import PERSONAL, TRAIN_METRICS, answer_message
from fedseg.privacy import secagg
from fedseg.privacy.clipping import clip_factor
from fedseg.privacy.fixed_point import LIMBS, effective_weight, encode_numbers, encode_values
from fedseg.privacy.policy import Departure, check_departure
from fedseg.privacy.roster import Terms
from fedseg.privacy.secagg_masks import Words
from fedseg.privacy.secagg_state import State
from fedseg.privacy.secagg_wire import Purpose
from fedseg.privacy.sent_once import note_sending
from fedseg.privacy.words_checksum import checksum
from fedseg.registry import resolve
from fedseg.segmentation.metrics import empty_sums

__all__ = ["COMPARED", "SUMMED", "WORDS", "masked_answer", "masked_sums"]

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

_ROUNDING = 23
"""Keeps the draws of rounding apart from other uses of the seed."""


def check_weight(
    message: Message, study: StudyConfig, state: State, planned: Mapping[str, float]
) -> None:
    """Check before the training that the site's weight will fit into the sum.

    Args:
        message: The message to train.
        study: The study config.
        state: What the site keeps of the round.
        planned: Numbers of the training that are known; of a weight by others nothing is said.

    Raises:
        ProtocolError: It is larger than `privacy.secagg-max-weight`.
    """
    weigh = resolve("federation.weighting", study.federation.weighting, WEIGHTINGS)
    encoding = secagg.party(state, task_terms(message, study, "train")).encoding
    with contextlib.suppress(KeyError):
        effective_weight(float(weigh(planned)), encoding)


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
    terms = task_terms(message, study, "train")
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
    terms = task_terms(message, study, state.purpose)
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
    save_state(context, after)
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
