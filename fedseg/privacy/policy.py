"""A site's policy: what it is asked, and what is about to leave, judged by the rules of site.toml.

Each rule that is broken is a reason of its own. A rule that can't be judged counts as broken. Rules
about the study judge its config, which is what the coordinator says it will do; what the site can
check itself, on the very numbers and bytes that leave, it checks in `check_departure`.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedseg.config import StudyConfig
from fedseg.errors import Reason, SiteError
from fedseg.registry import is_custom
from fedseg.site_config import PolicyConfig

__all__ = ["Departure", "Request", "check_departure", "check_request", "enough_cases"]

log = logging.getLogger(__name__)

Judged = TypeVar("Judged")

_ROUNDING = 1 + 1e-4
"""A clipped update's norm may pass the bound by what float32 rounds."""

_PERSONAL = "personal."
"""What the sums of a site's own model begin with; a policy names them without."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a message asks of the site.

    Attributes:
        kind: hello, fingerprint, train, evaluate or secagg.
        study: The study config.
        model: Name of the network in the plan, None where the message has no plan.
        peers: Other sites in the study, as the message says; None where it doesn't.
    """

    kind: str
    study: StudyConfig
    model: str | None = None
    peers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Departure:
    """What is about to leave.

    Attributes:
        kind: Of the message it answers.
        study: The study config.
        size: Bytes of arrays, fingerprint and protocol message.
        metrics: Numbers by name; also those that leave only as a part of a masked sum.
        fingerprint: Whether a fingerprint is in it.
        norm: L2 norm of the update as it leaves, None where there is none or it is masked.
        noise: Standard deviation of the noise in it.
    """

    kind: str
    study: StudyConfig
    size: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    fingerprint: bool = False
    norm: float | None = None
    noise: float = 0.0


def check_request(policy: PolicyConfig, request: Request) -> None:
    """Judge what the site is asked before anything is done for it.

    Saying hello is judged by `queries` alone: a refusal of the study is then told by its name.

    Raises:
        SiteError: A rule is broken, or can't be judged.
    """
    for reason, holds in _OF_A_REQUEST.items():
        if request.kind != "hello" or reason == Reason.POLICY_QUERIES:
            _judge(reason, holds, policy, request)


def check_departure(policy: PolicyConfig, departure: Departure) -> None:
    """Judge an answer in the form in which it leaves.

    Raises:
        SiteError: A rule is broken, or can't be judged.
    """
    for reason, holds in _OF_A_DEPARTURE.items():
        _judge(reason, holds, policy, departure)


def enough_cases(policy: PolicyConfig, *, training: int) -> None:
    """Judge the number of cases to train on; how many of all are held out, the study decides.

    Raises:
        SiteError: They are too few.
    """
    if not training >= policy.min_cases:
        raise SiteError(Reason.POLICY_MIN_CASES)


def _judge(
    reason: Reason,
    holds: Callable[[PolicyConfig, Judged], bool],
    policy: PolicyConfig,
    judged: Judged,
) -> None:
    try:
        kept = holds(policy, judged)
    except Exception as error:
        log.exception("%s couldn't be judged", reason.value)
        raise SiteError(Reason.POLICY_ERROR) from error
    if kept is not True:
        raise SiteError(reason)


def _query(policy: PolicyConfig, request: Request) -> bool:
    return policy.queries is None or request.kind in policy.queries


def _custom_code(policy: PolicyConfig, request: Request) -> bool:
    names = [request.study.model.name, request.study.train.loss, request.model or ""]
    if request.study.privacy.secure_aggregation:  # then a site works out its own weight
        names.append(request.study.federation.weighting)
    return policy.allow_custom_code or not any(is_custom(name) for name in names)


def _model(policy: PolicyConfig, request: Request) -> bool:
    names = {request.study.model.name, request.model or request.study.model.name}
    return policy.models is None or names <= set(policy.models)


def _strategy(policy: PolicyConfig, request: Request) -> bool:
    return policy.strategies is None or request.study.federation.strategy in policy.strategies


def _peers(policy: PolicyConfig, request: Request) -> bool:
    return policy.min_peers == 0 or (request.peers or 0) >= policy.min_peers


def _secure_aggregation(policy: PolicyConfig, request: Request) -> bool:
    return not policy.require_secure_aggregation or request.study.privacy.secure_aggregation


def _privacy_mode(policy: PolicyConfig, request: Request) -> bool:
    return policy.privacy_modes is None or request.study.privacy.mode in policy.privacy_modes


def _epsilon(policy: PolicyConfig, request: Request) -> bool:
    """With noise of its own the site counts for itself: `federation.site_spending`."""
    if request.study.privacy.mode in ("local-dp", "record-dp"):
        return True
    return policy.max_epsilon is None or _promised_epsilon(request.study) <= policy.max_epsilon


def _noise(policy: PolicyConfig, request: Request) -> bool:
    return policy.min_noise is None or _promised_noise(request.study) >= policy.min_noise


def _clip(policy: PolicyConfig, request: Request) -> bool:
    return policy.max_clip is None or _promised_clip(request.study) <= policy.max_clip


def _promised_epsilon(study: StudyConfig) -> float:
    """Epsilon at which the study says it ends; infinite where it promises none."""
    most = study.privacy.max_epsilon
    return math.inf if study.privacy.mode == "none" or most is None else most


def _promised_noise(study: StudyConfig) -> float:
    """Noise multiplier of the study; 0 where it adds no noise."""
    return study.privacy.noise_multiplier or 0.0


def _promised_clip(study: StudyConfig) -> float:
    """Norm to which the study clips; infinite where it doesn't."""
    bounds = [study.privacy.clip]
    if study.privacy.secure_aggregation:
        bounds.append(study.privacy.secagg_max_norm)
    return min((bound for bound in bounds if bound is not None), default=math.inf)


def _size(policy: PolicyConfig, departure: Departure) -> bool:
    return policy.max_bytes is None or departure.size <= policy.max_bytes


def _metrics(policy: PolicyConfig, departure: Departure) -> bool:
    if policy.metrics is None or (departure.kind == "train" and "training" in policy.metrics):
        return True
    names = [name.removeprefix(_PERSONAL) for name in departure.metrics]
    return all(
        any(name == allowed or name.startswith(f"{allowed}.") for allowed in policy.metrics)
        for name in names
    )


def _evaluation_cases(policy: PolicyConfig, departure: Departure) -> bool:
    """Sums over few cases are those cases' metrics; a region may be in fewer than all."""
    if departure.kind != "evaluate":
        return True
    counts = [value for name, value in departure.metrics.items() if _counts_cases(name)]
    return all(count == 0 or count >= policy.min_evaluation_cases for count in counts)


def _counts_cases(name: str) -> bool:
    """`cases`, `liver.dice.count`, `tumor.lesions.free.cases`: over how many cases sums are."""
    return name.rpartition(".")[2] in ("cases", "count")


def _fingerprint(policy: PolicyConfig, departure: Departure) -> bool:
    return not departure.fingerprint or policy.share_fingerprint


def _norm(policy: PolicyConfig, departure: Departure) -> bool:
    """An update is clipped before noise; with noise in it its norm says nothing of the clipping.

    With record-dp it is the gradients that are clipped.
    """
    tells = departure.noise == 0 and departure.study.privacy.mode != "record-dp"
    if policy.max_clip is None or departure.norm is None or not tells:
        return True
    return departure.norm <= policy.max_clip * _ROUNDING


_OF_A_REQUEST: Mapping[Reason, Callable[[PolicyConfig, Request], bool]] = {
    Reason.POLICY_QUERIES: _query,
    Reason.POLICY_CUSTOM_CODE: _custom_code,
    Reason.POLICY_MODELS: _model,
    Reason.POLICY_STRATEGIES: _strategy,
    Reason.POLICY_MIN_PEERS: _peers,
    Reason.POLICY_SECURE_AGGREGATION: _secure_aggregation,
    Reason.POLICY_PRIVACY_MODES: _privacy_mode,
    Reason.POLICY_MAX_EPSILON: _epsilon,
    Reason.POLICY_MIN_NOISE: _noise,
    Reason.POLICY_MAX_CLIP: _clip,
}

_OF_A_DEPARTURE: Mapping[Reason, Callable[[PolicyConfig, Departure], bool]] = {
    Reason.POLICY_MAX_BYTES: _size,
    Reason.POLICY_METRICS: _metrics,
    Reason.POLICY_EVALUATION_CASES: _evaluation_cases,
    Reason.POLICY_FINGERPRINT: _fingerprint,
    Reason.POLICY_MAX_CLIP: _norm,
}
