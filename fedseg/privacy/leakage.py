"""Leak test: what a server or a peer can tell about a site's scans from this study's own updates.

A short study is trained on sites whose cases are split in halves, members and others. Membership
inference and gradient inversion are tried on what each protection lets an attacker see. A LOWER
bound on the risk: an attack that fails here proves nothing, real attackers do better.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedseg.privacy.inversion import Likeness
from fedseg.privacy.membership import (
    Candidate,
    Separation,
    alignment,
    case_gradient,
    case_loss,
    separation,
)
from fedseg.privacy.probe import probe
from fedseg.privacy.rehearsal import (
    Floats,
    Rehearsal,
    get_weights,
    known_patches,
    rehearse,
    set_weights,
)
from fedseg.privacy.views import SETTINGS, Terms
from fedseg.segmentation.layers import place
from fedseg.segmentation.models import build_model, parameter_count

__all__ = ["LeakReport", "Row", "leak_test"]

_PATCHES = 4
"""Patches of a case that the attacker looks at."""

_CANDIDATES, _VIEWS = 81, 82

_HALVES = ("members", "others")

_Cases = dict[str, list[list[Candidate]]]
_Numbers = dict[str, list[list[float]]]
"""By half of the cases: `[site][case]`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the attacks reach under one setting.

    Attributes:
        sees: What the attacker sees.
        alignment: Membership, from the updates.
        loss: Membership, from the final global model.
        members_loss: That model's mean loss on the members; None where it isn't finite.
        others_loss: On the others.
        reconstruction: How like the true patch the reconstructed one is.
    """

    sees: str
    alignment: Separation
    loss: Separation
    members_loss: float | None
    others_loss: float | None
    reconstruction: Likeness


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """What a leak test found.

    Attributes:
        facts: Sizes, seed, clip norm and the like.
        rows: Name of a setting to its row.
        guesses: How like the true patch guesses are that need no update.
        images: The true patch, the guess from its labels, and each setting's reconstruction,
            `[x, y, z]`. They show a part of a scan, so `to_json` leaves them out.
    """

    facts: Mapping[str, Any]
    rows: Mapping[str, Row]
    guesses: Mapping[str, Likeness]
    images: Mapping[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "note": "a lower bound on the risk: an attack that fails here proves nothing",
            **self.facts,
            "settings": {name: asdict(row) for name, row in self.rows.items()},
            "guesses": {name: asdict(found) for name, found in self.guesses.items()},
        }


def leak_test(test: Rehearsal, *, state: Mapping[str, torch.Tensor] | None = None) -> LeakReport:
    """Train a short study under each protection and attack what is seen of it.

    The attack on updates sees those of the unprotected study, put through each protection: all
    settings are compared on the same updates. The attack on the final model needs a study of each
    setting's own.

    Args:
        test: Sites and options.
        state: Weights to start from; by default the seed's.
    """
    network = build_model(test.plan, seed=test.options.seed)
    if state is not None:
        network.load_state_dict(dict(state))
    first = get_weights(network)
    place(network, test.device)
    cases = {half: _candidates(test, half) for half in _HALVES}
    start = _losses(test, network, cases)
    scores = {
        name: {half: [[0.0] * len(site) for site in sites] for half, sites in cases.items()}
        for name in SETTINGS
    }
    terms: Terms | None = None
    final: dict[str, _Numbers] = {}

    def attack(number: int, updates: Floats, terms: Terms) -> None:
        seen = _seen(test, number, updates, terms)
        _add_alignment(scores, test, network, cases, seen)

    for name, setting in SETTINGS.items():
        if setting.model:
            continue
        set_weights(network, first)
        on_round = attack if name == "none" else None
        terms = rehearse(test, network, name, setting, terms=terms, on_round=on_round)
        final[name] = _losses(test, network, cases)
    assert terms is not None
    found = probe(test, first)
    rows = {}
    for name, setting in SETTINGS.items():
        after = final[setting.model or name]
        gained = {half: _differences(start[half], after[half]) for half in _HALVES}
        rows[name] = Row(
            sees=setting.sees,
            alignment=_separation(test, scores[name]),
            loss=_separation(test, gained),
            members_loss=_mean(after["members"]),
            others_loss=_mean(after["others"]),
            reconstruction=found.likeness[name],
        )
    facts = {**_facts(test, network, terms), "reconstructed_patch": list(found.shape)}
    return LeakReport(facts=facts, rows=rows, guesses=found.guesses, images=found.images)


def _candidates(test: Rehearsal, half: str) -> list[list[Candidate]]:
    """Patches of each case of a half; which ones depends on seed, site and case alone."""
    found: list[list[Candidate]] = []
    for site, cohort in enumerate(test.cohorts):
        cases = cohort.members if half == "members" else cohort.others
        found.append([])
        for index, case in enumerate(cases):
            stream = (_CANDIDATES, site, _HALVES.index(half), index)
            image, labels = known_patches(test, [case], _PATCHES, test.plan.patch_size, *stream)
            found[-1].append(Candidate(image=image, labels=labels, annotated=cohort.annotated))
    return found


def _losses(test: Rehearsal, network: nn.Module, cases: _Cases) -> _Numbers:
    network.eval()
    with torch.inference_mode():
        return {
            half: [[float(case_loss(network, case, test.loss)) for case in site] for site in sites]
            for half, sites in cases.items()
        }


def _seen(
    test: Rehearsal, number: int, updates: Floats, terms: Terms
) -> dict[str, Sequence[Floats]]:
    """What is seen of each site in a round, under each setting."""
    seen: dict[str, Sequence[Floats]] = {}
    for name, setting in SETTINGS.items():
        rng = np.random.default_rng([test.options.seed, _VIEWS, number, *name.encode()])
        if setting.of_all:  # one sum with one draw of noise, whoever is looked for in it
            seen[name] = [setting.view(updates, 0, terms, rng)] * len(updates)
        else:
            seen[name] = [setting.view(updates, i, terms, rng) for i in range(len(updates))]
    return seen


def _add_alignment(
    scores: dict[str, _Numbers],
    test: Rehearsal,
    network: nn.Module,
    cases: _Cases,
    seen: Mapping[str, Sequence[Floats]],
) -> None:
    for half, sites in cases.items():
        for site, candidates in enumerate(sites):
            for index, case in enumerate(candidates):
                gradient = case_gradient(network, case, test.loss).numpy()
                for name, updates in seen.items():
                    scores[name][half][site][index] += alignment(updates[site], gradient)


def _differences(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> list[list[float]]:
    return [
        [old - new for old, new in zip(first, last, strict=True)]
        for first, last in zip(before, after, strict=True)
    ]


def _separation(test: Rehearsal, numbers: _Numbers) -> Separation:
    return separation(numbers["members"], numbers["others"], seed=test.options.seed)


def _mean(numbers: Sequence[Sequence[float]]) -> float | None:
    mean = float(np.mean(list(itertools.chain.from_iterable(numbers))))
    return mean if math.isfinite(mean) else None


def _facts(test: Rehearsal, network: nn.Module, terms: Terms) -> dict[str, Any]:
    options, plan = test.options, test.plan
    return {
        "seed": options.seed,
        "sites": len(test.cohorts),
        "members": sum(len(cohort.members) for cohort in test.cohorts),
        "others": sum(len(cohort.others) for cohort in test.cohorts),
        "rounds": options.rounds,
        "steps": options.steps,
        "model": plan.model,
        "parameters": parameter_count(network),
        "spacing": list(plan.spacing),
        "patch": list(plan.patch_size),
        "clip": terms.clip,
        "noise_multiplier": terms.noise_multiplier,
        "iterations": options.iterations,
    }
