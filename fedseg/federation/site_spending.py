"""What a site's data has spent of its privacy, over all studies: kept in the site's own ledger.

With local-dp and record-dp the site adds the noise itself, so it needs no server's word for what a
study costs it. A release counts before it leaves. What a line of the ledger stands for is told by
its cases: digests of the scans under a key that lies beside the ledger, so that who reads the
ledger can't tell whether a scan they have is among them. All earlier releases that share a case
with what is asked now count; those under a key that is lost count always.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedseg.config import StudyConfig
from fedseg.data.measure import scan_contents
from fedseg.data.plan import Plan
from fedseg.data.site_secret import site_secret
from fedseg.data.sites import Site
from fedseg.errors import ConfigError, Reason, SiteError
from fedseg.messages import Task
from fedseg.privacy.accountant import Mechanism, epsilon_of
from fedseg.privacy.ledger import Entry, append_judged, read
from fedseg.privacy.mechanisms import mechanism_of

__all__ = ["SPENT", "charge", "check_spending"]

SPENT = "spent"
"""Kind of the ledger's lines about what was spent."""

_DELTA = 1e-5
"""A study can't make its epsilon small at the site by a larger delta."""


def check_spending(site: Site, study: StudyConfig, plan: Plan) -> None:
    """Check, before anything is trained, that the site's policy lets its data spend this.

    Raises:
        SiteError: Its policy's `max-epsilon` would be passed, or what counts it isn't installed.
        LedgerError: Its ledger doesn't hold together.
    """
    if _mechanism(study, plan) is not None:
        _spending(site, study, plan, read(site.config.ledger_file))


def charge(site: Site, study: StudyConfig, plan: Plan, task: Task) -> None:
    """Write down what is about to leave; on disk when this returns.

    Raises:
        SiteError: Its policy's `max-epsilon` would be passed, by now.
        LedgerError: The ledger can't be written, or doesn't hold together.
    """
    if _mechanism(study, plan) is None:
        return
    told = {"run": task.study_run, "round": task.round_number}
    append_judged(
        site.config.ledger_file,
        lambda entries: {
            "kind": SPENT,
            "site": site.name,
            **told,
            **_spending(site, study, plan, entries),
        },
    )


def _mechanism(study: StudyConfig, plan: Plan) -> Mechanism | None:
    """What the site itself releases in a round, None where it adds no noise."""
    if study.privacy.mode == "central-dp":
        return None
    return mechanism_of(study, batch_size=plan.batch_size)


def _spending(
    site: Site, study: StudyConfig, plan: Plan, entries: Sequence[Entry]
) -> Mapping[str, Any]:
    """What one more release makes of what was spent."""
    mechanism = _mechanism(study, plan)
    assert mechanism is not None
    key = site_secret(site.config.ledger_file)
    name = hashlib.sha256(key).hexdigest()[:16]
    cases = [_mark(content, key) for content in scan_contents(site)]
    own = set(cases)
    before = Counter(
        _mechanism_in(entry)
        for entry in entries
        if entry.get("kind") == SPENT and (entry["key"] != name or own & set(entry["cases"]))
    )
    before[mechanism] += 1
    delta = min(study.privacy.delta, _DELTA)
    try:
        epsilon = epsilon_of(list(before.items()), delta=delta)
    except ConfigError as error:
        raise SiteError(Reason.ACCOUNTANT_MISSING, str(error)) from None
    most = site.config.policy.max_epsilon
    if most is not None and epsilon > most:
        raise SiteError(
            Reason.POLICY_MAX_EPSILON,
            f"this data would have spent an epsilon of {epsilon:.2f} over all studies; policy "
            f"max-epsilon is {most:g}",
        )
    return {
        "mode": study.privacy.mode,
        "noise_multiplier": mechanism.noise_multiplier,
        "rate": mechanism.rate,
        "steps": mechanism.steps,
        "epsilon": epsilon,
        "delta": delta,
        "key": name,
        "cases": sorted(own),
    }


def _mechanism_in(entry: Entry) -> Mechanism:
    return Mechanism(
        noise_multiplier=float(entry["noise_multiplier"]),
        rate=float(entry["rate"]),
        steps=int(entry["steps"]),
    )


def _mark(content: str, key: bytes) -> str:
    return hmac.new(key, bytes.fromhex(content), hashlib.sha256).hexdigest()[:16]
