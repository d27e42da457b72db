"""Measure the cases of a site for its fingerprint, each scan once."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from fedseg.data.cases import Case, files_of
from fedseg.data.checks.digest import content_digest, keyed_digest
from fedseg.data.fingerprint import CaseMeasure, Fingerprint, bin_of, fingerprint_of
from fedseg.data.fingerprint_noise import noised_fingerprint
from fedseg.data.plan import REGIONS
from fedseg.data.preprocess import AIR_HU, modality_of
from fedseg.data.site_secret import site_secret
from fedseg.data.sites import Site
from fedseg.data.volumes import Volume, read_image, read_mask
from fedseg.data.whole_file import replace_file
from fedseg.errors import CaseError, Reason, SiteError
from fedseg.site_config import SiteConfig

__all__ = ["measure", "scan_contents", "site_fingerprint"]

log = logging.getLogger(__name__)

_VERSION = 1
"""Raise it when measuring changes: kept measures are then made again."""

Modality = Literal["ct", "mr"]


def measure(
    scan: Volume, labels: np.ndarray, *, modality: Literal["ct", "mr"], annotated: Sequence[str]
) -> CaseMeasure:
    """Measure one case.

    Args:
        scan: The scan; HU where it is CT.
        labels: Its mask `[X, Y, Z]`.
        modality: Settled modality: MR has no HU histogram.
        annotated: Regions the site annotates.
    """
    found: CaseMeasure = {}
    body = scan.array > (AIR_HU if modality == "ct" else scan.array.mean())
    if modality == "ct":
        found["body.hu"] = _shares("body.hu", scan.array[body])
        for region in annotated:
            inside = scan.array[labels >= REGIONS[region]]
            if inside.size:
                found[f"{region}.hu"] = _shares(f"{region}.hu", inside)
    for axis, name in enumerate("xyz"):
        found[f"spacing.{name}"] = _shares(f"spacing.{name}", np.array([scan.spacing[axis]]))
        others = tuple(other for other in range(3) if other != axis)
        where = np.flatnonzero(body.any(axis=others))
        extent = (where[-1] - where[0] + 1) * scan.spacing[axis] if where.size else 0.0
        found[f"extent.{name}"] = _shares(f"extent.{name}", np.array([extent]))
    if "tumor" in annotated and (labels == 2).any():
        found["lesion.ml"] = _lesions(labels == 2, math.prod(scan.spacing) / 1000)
    return found


def _shares(name: str, values: np.ndarray) -> dict[int, float]:
    counts = np.bincount(bin_of(name, values))
    return {int(i): float(counts[i] / values.size) for i in np.flatnonzero(counts)}


def _lesions(tumor: np.ndarray, ml_per_voxel: float) -> dict[int, float]:
    components, _ = ndimage.label(tumor, structure=np.ones((3, 3, 3)))
    volumes = np.bincount(components.ravel())[1:] * ml_per_voxel
    counts = np.bincount(bin_of("lesion.ml", volumes))
    return {int(i): float(counts[i]) for i in np.flatnonzero(counts)}


def site_fingerprint(site: Site) -> Fingerprint:
    """Measure a site's usable cases and merge them by its policy.

    Raises:
        SiteError: The policy shares no fingerprint, or there are fewer cases than its minimum.
        LedgerError: The secret that noise is drawn from can't be used.
    """
    policy = site.config.policy
    if not policy.share_fingerprint:
        raise SiteError(Reason.POLICY_FINGERPRINT)
    measures: list[CaseMeasure] = []
    modalities: list[Modality] = []
    contents: list[str] = []
    for case in site.cases:
        try:
            modality, found, content = _kept_measure(case, site)
        except CaseError as error:
            log.warning("skipped: %s", error)
            continue
        modalities.append(modality)
        measures.append(found)
        contents.append(content)
    fingerprint, usable = _fingerprint(measures, modalities, site.config)
    if usable < policy.fingerprint_min_cases:
        raise SiteError(
            Reason.POLICY_FINGERPRINT,
            f"no fingerprint: {usable} usable cases are fewer than "
            f"policy.fingerprint-min-cases {policy.fingerprint_min_cases}; the site still trains",
        )
    if site.config.study_key is not None and policy.fingerprint_epsilon is None:
        key = site.config.study_key.encode()
        digests = tuple(sorted(keyed_digest(bytes.fromhex(text), key) for text in contents))
        fingerprint = fingerprint.model_copy(update={"digests": digests})
    if fingerprint.held_back:
        rule = "min-count" if policy.fingerprint_epsilon is None else "fingerprint-epsilon"
        log.info("held back by policy.%s: %s", rule, ", ".join(fingerprint.held_back))
    return fingerprint


def _fingerprint(
    measures: Sequence[CaseMeasure], modalities: Sequence[Modality], config: SiteConfig
) -> tuple[Fingerprint, int]:
    """Also the number of cases by which the policy decides whether it leaves."""
    device, memory = _device_of(config.device)
    min_count, epsilon = config.policy.min_count, config.policy.fingerprint_epsilon
    if epsilon is None:
        fingerprint = fingerprint_of(
            measures,
            modalities=modalities,
            min_count=min_count,
            device=device,
            memory_gb=memory,
        )
        return fingerprint, len(measures)
    if config.study_key is not None:
        log.warning("no digests of scans leave: policy.fingerprint-epsilon couldn't cover them")
    fingerprint = noised_fingerprint(
        measures,
        modalities=modalities,
        min_count=min_count,
        epsilon=epsilon,
        secret=site_secret(config.ledger_file),
        device=device,
        memory_gb=memory,
    )
    # Whether it leaves tells of the cases, too, so the noised number decides.
    return fingerprint, max(1, fingerprint.ct + fingerprint.mr)


def scan_contents(site: Site) -> list[str]:
    """Content digest of each usable scan, hexadecimal: the same wherever its files lie."""
    found = []
    for case in site.cases:
        try:
            found.append(_kept_measure(case, site)[2])
        except CaseError:
            continue  # it isn't trained on either
    return found


def _kept_measure(case: Case, site: Site) -> tuple[Modality, CaseMeasure, str]:
    """Measure a case and digest its scan, or find what was kept for the same files and options."""
    config = site.config
    kept = config.cache / "measures" / f"{_name(case, config)}.json"
    try:
        modality, found, content = json.loads(kept.read_text(encoding="utf-8"))
        measured = {key: {int(i): m for i, m in part.items()} for key, part in found.items()}
        return modality, measured, content
    except (OSError, ValueError, AttributeError):
        pass  # not kept yet, or damaged: measure it
    scan = read_image(case.image)
    labels = read_mask(case.mask, image=scan, label_map=config.label_map)
    modality = modality_of(scan.array, config.modality)
    measured = measure(scan, labels.array, modality=modality, annotated=config.labels)
    content = content_digest(scan.array).hex()
    _keep(kept, [modality, measured, content])
    return modality, measured, content


def _name(case: Case, config: SiteConfig) -> str:
    """Name of a kept measure: identity of the files, and options that change it."""
    try:
        files = [file for path in (case.image, case.mask) for file in files_of(path)]
        stats = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    except OSError:
        raise CaseError(case.image, "image or mask is gone", "correct the path") from None
    options = [config.modality, config.labels, sorted((config.label_map or {}).items(), key=str)]
    return hashlib.sha256(json.dumps([_VERSION, stats, options]).encode()).hexdigest()[:32]


def _keep(path: Path, content: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(content).encode())
    except OSError as error:
        log.warning("can't keep measures in the cache (%s)", error.strerror)


def _device_of(name: str) -> tuple[Literal["cpu", "cuda", "mps"], int]:
    """Kind of device that `auto` or a name gives here, and its memory in GB."""
    gigabyte = 1024**3
    if name.startswith("cuda") or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            return "cuda", 1
        return "cuda", torch.cuda.get_device_properties(0).total_memory // gigabyte
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // gigabyte
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return "mps", memory
    return "cpu", memory
