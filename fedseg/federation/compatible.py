"""What can't go together: one table of the reasons, looked up before a site is asked."""

from collections.abc import Callable, Iterator

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.federation.reduce import REDUCERS
from fedseg.federation.site_privacy import clips_updates

__all__ = ["check_compatible", "compatible"]

Rule = tuple[str, Callable[[StudyConfig], bool], str]
"""Key, whether its value is a conflict, and why with the mend."""

_ALONE = "the server sees no single update"

SECURE: tuple[Rule, ...] = (
    (
        "federation.strategy",
        lambda study: study.federation.strategy in {*REDUCERS} - {"mean"},
        f"{_ALONE}, and this strategy looks at each; take fedavg, fedprox, fedavgm, fedadam, "
        "fedyogi or fedadagrad",
    ),
    (
        "federation.guard",
        lambda study: study.federation.guard,
        f"{_ALONE} to judge; set federation.guard = false and, as a bound at the site instead, "
        "privacy.secagg-max-norm",
    ),
    (
        "federation.guard-probe",
        lambda study: study.federation.guard_probe is not None,
        f"{_ALONE} to try out; leave it empty",
    ),
    (
        "federation.compression",
        lambda study: study.federation.compression != "none",
        "words are masked one by one and can't be left out or shortened; set it to none",
    ),
    (
        "federation.late",
        lambda study: study.federation.late != "drop",
        "an update that comes late still has its masks; set it to drop",
    ),
    (
        "federation.weighting",
        lambda study: study.federation.weighting == "annotated",
        "it weighs the rows of tumour by site; take another",
    ),
    (
        "federation.weighting",
        lambda study: (
            study.federation.weighting == "voxels" and study.privacy.secagg_max_weight < 1e6
        ),
        "sites have millions of voxels; set privacy.secagg-max-weight to the most of one",
    ),
    (
        "train.minutes",
        lambda study: study.train.minutes is not None,
        "sites then count by their mean step (FedNova), which isn't summed; leave it empty",
    ),
)
"""With `privacy.secure-aggregation`."""

_SUM = "noise is for a sum of clipped updates"

CENTRAL: tuple[Rule, ...] = (
    (
        "federation.strategy",
        lambda study: study.federation.strategy in {*REDUCERS} - {"mean"},
        f"{_SUM}, and this strategy looks at each; take fedavg, fedprox, fedavgm, fedadam, fedyogi "
        "or fedadagrad",
    ),
    (
        "federation.weighting",
        lambda study: study.federation.weighting != "equal",
        f"{_SUM}, a site of more weight would change more than its clip; set it to equal",
    ),
    (
        "federation.guard",
        lambda study: study.federation.guard,
        "it leaves updates out by what the others are, so that one site could change more than "
        "its own; set it to false: privacy.clip bounds what a site can do",
    ),
    (
        "federation.late",
        lambda study: study.federation.late != "drop",
        "a site could count twice in a round; set it to drop",
    ),
    (
        "train.minutes",
        lambda study: study.train.minutes is not None,
        f"{_SUM}, and sites would count by their mean step (FedNova); leave it empty",
    ),
)
"""With `privacy.mode = central-dp`."""

CLIPPED: tuple[Rule, ...] = (
    (
        "federation.compression",
        lambda study: study.federation.compression != "none",
        "what it loses is added to the next update, past the clip; set it to none",
    ),
)
"""Where updates are clipped. (With record-dp the update is noised already: all may follow.)"""

RECORD: tuple[Rule, ...] = (
    (
        "train.backend",
        lambda study: study.train.backend != "torch",
        "the gradient of each case is clipped in FedSeg's own loop; set it to torch",
    ),
    (
        "train.minutes",
        lambda study: study.train.minutes is not None,
        "epsilon depends on the number of steps; leave it empty",
    ),
)
"""With `privacy.mode = record-dp`."""


def _tables(study: StudyConfig) -> Iterator[tuple[str, tuple[Rule, ...]]]:
    """Tables that hold for a study, and the setting they go with."""
    if study.privacy.secure_aggregation:
        yield "privacy.secure-aggregation", SECURE
    if clips_updates(study):
        yield "privacy.clip", CLIPPED
    for mode, rules in (("central-dp", CENTRAL), ("record-dp", RECORD)):
        if study.privacy.mode == mode:
            yield f"privacy.mode = {mode}", rules


def compatible(study: StudyConfig) -> list[str]:
    """List what of a study can't go together, one line each; empty where all can."""
    found = []
    for beside, rules in _tables(study):
        for key, clashes, why in rules:
            if clashes(study):
                section, _, name = key.partition(".")
                value = getattr(getattr(study, section), name.replace("-", "_"))
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                found.append(f"{key}: got {shown} with {beside}; {why}")
    return found


def check_compatible(study: StudyConfig) -> None:
    """Check a study at its start.

    Raises:
        ConfigError: Something in it can't go together.
    """
    found = compatible(study)
    if found:
        raise ConfigError("\n".join(found))
