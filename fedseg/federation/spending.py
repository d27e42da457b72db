"""What a run has spent of its privacy, and whether it can pay for another round.

A release counts before it is made: the count is on disk first. A server that is killed after a
round's noise was drawn, but before the round was saved, does the round anew with other noise, and
both count, for both may have been seen. So no resume takes epsilon back.
"""

import json
from pathlib import Path

from fedseg.data.whole_file import replace_file
from fedseg.errors import StudyError
from fedseg.federation.federation import Federation
from fedseg.privacy.accountant import Mechanism, epsilon_of
from fedseg.privacy.mechanisms import mechanism_of

__all__ = ["can_pay", "spend", "spent"]


def _mechanism(federation: Federation) -> Mechanism | None:
    return mechanism_of(federation.study, batch_size=federation.plan.batch_size)


def _file(federation: Federation) -> Path:
    return federation.folder.path / "checkpoint" / "privacy.json"


def _releases(federation: Federation) -> int:
    """Releases so far: what the last whole round knew, and what was begun since.

    Raises:
        StudyError: The file that counts them is damaged.
    """
    path = _file(federation)
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))["releases"]
    except FileNotFoundError:
        begun = 0
    except (OSError, ValueError, KeyError, TypeError):
        begun = None
    if not isinstance(begun, int):
        raise StudyError(
            f"{path}: can't be read, so what was spent of epsilon isn't known; bring it back from "
            "a backup"
        )
    return max(begun, federation.progress.releases)


def spend(federation: Federation) -> None:
    """Count a release that is about to be made; on disk when this returns.

    Raises:
        StudyError: It can't be written: then nothing is released.
    """
    if _mechanism(federation) is None:
        return
    count = _releases(federation) + 1
    path = _file(federation)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"releases": count}).encode(), durable=True)
    except OSError as error:
        raise StudyError(
            f"{path}: can't be written ({error}); free space, then go on with output.resume"
        ) from None
    federation.progress.releases = count


def spent(federation: Federation) -> dict[str, float] | None:
    """What was spent so far, for the history; None without differential privacy."""
    mechanism, privacy = _mechanism(federation), federation.study.privacy
    if mechanism is None or privacy.clip is None or privacy.noise_multiplier is None:
        return None
    releases = _releases(federation)
    return {
        "epsilon": epsilon_of([(mechanism, releases)], delta=privacy.delta),
        "delta": privacy.delta,
        "releases": releases,
        "noise_multiplier": privacy.noise_multiplier,
        "clip": privacy.clip,
    }


def can_pay(federation: Federation) -> bool:
    """Whether the budget pays for one more release."""
    mechanism, privacy = _mechanism(federation), federation.study.privacy
    if mechanism is None or privacy.max_epsilon is None:
        return True
    after = [(mechanism, _releases(federation) + 1)]
    return epsilon_of(after, delta=privacy.delta) <= privacy.max_epsilon
