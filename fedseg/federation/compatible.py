"""What can't go together: one table of the reasons, looked up before a site is asked."""

from collections.abc import Callable

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.federation.reduce import REDUCERS

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
        "train.minutes",
        lambda study: study.train.minutes is not None,
        "sites then count by their mean step (FedNova), which isn't summed; leave it empty",
    ),
)
"""With `privacy.secure-aggregation`."""


def compatible(study: StudyConfig) -> list[str]:
    """List what of a study can't go together, one line each; empty where all can."""
    found = []
    for key, clashes, why in SECURE if study.privacy.secure_aggregation else ():
        if clashes(study):
            section, _, name = key.partition(".")
            value = getattr(getattr(study, section), name.replace("-", "_"))
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            found.append(f"{key}: got {shown} with privacy.secure-aggregation; {why}")
    return found


def check_compatible(study: StudyConfig) -> None:
    """Check a study at its start.

    Raises:
        ConfigError: Something in it can't go together.
    """
    found = compatible(study)
    if found:
        raise ConfigError("\n".join(found))
