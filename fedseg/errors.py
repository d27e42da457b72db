"""Errors a user can meet, each one line: what, got, where, how to mend.

FedSegError
├── ConfigError      a key of the study or the site config is wrong
├── DataError        a folder or file of a site is wrong
│   └── CaseError    one case is wrong; a round skips it and counts it
├── ModelError       a network can't be built, read or run
├── LedgerError      the site's ledger can't be written or read, or was tampered with
├── SiteError        a site can't or won't take part; carries the one Reason that may leave it
├── ProtocolError    a message or number that secure aggregation can't take
│   └── TooFewSites  too few sites are left in a round of it
└── StudyError       the run can't start or go on
"""

import re
import sys
from enum import StrEnum
from pathlib import Path

__all__ = [
    "REASONS",
    "CaseError",
    "ConfigError",
    "DataError",
    "FedSegError",
    "LedgerError",
    "ModelError",
    "ProtocolError",
    "Reason",
    "SiteError",
    "StudyError",
    "TooFewSites",
    "out_of_memory",
    "why_left_out",
]

_NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "OOM",
    "bad_alloc",
    "ALLOC_FAILED",
)
"""What torch's CPU allocator, MPS, C++ and CUDA's libraries say in a plain RuntimeError."""

_EXPECTED = re.compile(", expected | but image is ")


class FedSegError(Exception):
    """Base of all errors that are shown to a user without a traceback."""


class ConfigError(FedSegError):
    """A key of the study or site config has a wrong type, an impossible value or no meaning."""


class DataError(FedSegError):
    """A folder or file of a site can't be used."""


class CaseError(DataError):
    """One case can't be used.

    Attributes:
        path: The file; never leaves the site.
        what: What was got and what was expected.
        mend: How to mend it.
    """

    def __init__(self, path: Path | str, what: str, mend: str) -> None:
        """Compose the one-line message."""
        super().__init__(f"{path}: {what}; {mend}")
        self.path = Path(path)
        self.what = what
        self.mend = mend

    @property
    def got(self) -> str:
        """First part of `what`: what was got."""
        return _EXPECTED.split(self.what, maxsplit=1)[0]

    @property
    def expected(self) -> str:
        """Second part of `what`, `""` where it goes without saying."""
        return "".join(_EXPECTED.split(self.what, maxsplit=1)[1:])


class ModelError(FedSegError):
    """A network can't be built, read or run."""


class LedgerError(FedSegError):
    """The site's ledger can't be written or read, or doesn't hold together."""


class ProtocolError(FedSegError):
    """A message of secure aggregation is malformed, forged or out of turn, or a number too big."""


class TooFewSites(ProtocolError):
    """Fewer sites than the threshold are left in a round of secure aggregation."""


class StudyError(FedSegError):
    """The run can't start or go on."""


class Reason(StrEnum):
    """Why a site gave no update. A site sends only the code: no path, no case, no traceback."""

    NO_DATA = "no-data"
    NO_CASES = "no-cases"
    DATA = "data"
    SITE_CONFIG = "site-config"
    CONFIG_MISMATCH = "config-mismatch"
    PLAN = "plan"
    MODEL_MISSING = "model-missing"
    ACCOUNTANT_MISSING = "accountant-missing"
    MODEL = "model"
    OUT_OF_MEMORY = "out-of-memory"
    NOT_FINITE = "not-finite"
    BAD_UPDATE = "bad-update"
    ZERO_UPDATE = "zero-update"
    UPDATE_NORM = "update-norm"
    UPDATE_DIRECTION = "update-direction"
    UPDATE_PROBE = "update-probe"
    DEADLINE = "deadline"
    UNREACHABLE = "unreachable"
    CRASHED = "crashed"
    SECURE_AGGREGATION = "secure-aggregation"
    SENT_ALREADY = "sent-already"
    UNSIGNED = "unsigned"
    LEDGER = "ledger"
    ERROR = "error"
    POLICY_CUSTOM_CODE = "policy-custom-code"
    POLICY_MIN_CASES = "policy-min-cases"
    POLICY_MAX_BYTES = "policy-max-bytes"
    POLICY_FINGERPRINT = "policy-fingerprint"
    POLICY_EVALUATION_CASES = "policy-min-evaluation-cases"
    POLICY_MIN_PEERS = "policy-min-peers"
    POLICY_METRICS = "policy-metrics"
    POLICY_QUERIES = "policy-queries"
    POLICY_MODELS = "policy-models"
    POLICY_STRATEGIES = "policy-strategies"
    POLICY_SECURE_AGGREGATION = "policy-secure-aggregation"
    POLICY_PRIVACY_MODES = "policy-privacy-modes"
    POLICY_MAX_EPSILON = "policy-max-epsilon"
    POLICY_MIN_NOISE = "policy-min-noise"
    POLICY_MAX_CLIP = "policy-max-clip"
    POLICY_ERROR = "policy-error"

    @property
    def refused(self) -> bool:
        """Whether the site's policy said no, rather than something going wrong."""
        return self.value.startswith("policy-")


REASONS: dict[Reason, str] = {
    Reason.NO_DATA: "its node has neither data-dir nor partition-id; set data-dir in --node-config",
    Reason.NO_CASES: "it has no usable case; run `fedseg check` on its data-dir",
    Reason.DATA: "its folder can't be used; run `fedseg check` on its data-dir",
    Reason.SITE_CONFIG: "its site.toml or --node-config is wrong; its own log says where",
    Reason.CONFIG_MISMATCH: "its study config differs from the server's; use the same app bundle",
    Reason.PLAN: "it can't follow the plan; its own log says why",
    Reason.MODEL_MISSING: "the package of model.name, train.loss or train.backend isn't there",
    Reason.ACCOUNTANT_MISSING: "it lacks dp-accounting; run `pip install 'fedseg[dp]'` there",
    Reason.MODEL: "it can't build the network; its own log says why",
    Reason.OUT_OF_MEMORY: "it ran out of memory; take a smaller train.patch-size or batch-size",
    Reason.NOT_FINITE: "its update has NaN or Inf; take a smaller train.learning-rate",
    Reason.BAD_UPDATE: "its update has other names, shapes or types than the model",
    Reason.ZERO_UPDATE: "its update changes nothing; check its data and train.learning-rate",
    Reason.UPDATE_NORM: "its update is far larger than the others' (federation.guard-norm)",
    Reason.UPDATE_DIRECTION: "its updates go against the others' (federation.guard-opposition)",
    Reason.UPDATE_PROBE: "its update makes the model worse on the server's cases",
    Reason.DEADLINE: "it didn't answer within the deadline",
    Reason.UNREACHABLE: "its node went away",
    Reason.CRASHED: "its process was killed, most often for lack of memory",
    Reason.SECURE_AGGREGATION: "it refused or broke secure aggregation; the log there says why",
    Reason.SENT_ALREADY: "it took this step of the round's sum before, and does so once",
    Reason.UNSIGNED: "its node runs only a bundle signed by someone it trusts; sign this one",
    Reason.LEDGER: "its ledger can't be written, so nothing left; its own log says why",
    Reason.ERROR: "it failed; its own log says why",
    Reason.POLICY_CUSTOM_CODE: "its policy forbids code from outside fedseg (allow-custom-code)",
    Reason.POLICY_MIN_CASES: "it has fewer cases than its policy's min-cases",
    Reason.POLICY_FINGERPRINT: "its policy shares no fingerprint; it still trains",
    Reason.POLICY_MAX_BYTES: "the update is larger than its policy's max-bytes",
    Reason.POLICY_EVALUATION_CASES: "its metrics stand for too few cases (min-evaluation-cases)",
    Reason.POLICY_MIN_PEERS: "the study has fewer other sites than its policy's min-peers",
    Reason.POLICY_METRICS: "its policy doesn't let these metrics leave (metrics)",
    Reason.POLICY_QUERIES: "its policy doesn't answer this (queries)",
    Reason.POLICY_MODELS: "its policy doesn't allow this model.name (models)",
    Reason.POLICY_STRATEGIES: "its policy doesn't allow this federation.strategy (strategies)",
    Reason.POLICY_SECURE_AGGREGATION: "its policy wants privacy.secure-aggregation",
    Reason.POLICY_PRIVACY_MODES: "its policy doesn't allow this privacy.mode (privacy-modes)",
    Reason.POLICY_MAX_EPSILON: "privacy.max-epsilon is unset or over its policy's max-epsilon",
    Reason.POLICY_MIN_NOISE: "privacy.noise-multiplier is under its policy's min-noise",
    Reason.POLICY_MAX_CLIP: "updates aren't clipped to its policy's max-clip",
    Reason.POLICY_ERROR: "its policy couldn't be judged, so it refused; its own log says why",
}


class SiteError(FedSegError):
    """A site can't or won't take part in a round.

    Attributes:
        reason: The code that leaves the site; the message stays in the site's log.
    """

    def __init__(self, reason: Reason, message: str = "") -> None:
        """Keep the reason and a message for the local log."""
        super().__init__(message or REASONS[reason])
        self.reason = reason


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out; torch has an exception of its own for it on CUDA alone."""
    torch = sys.modules.get("torch")  # not imported for this: whoever raised its error has it
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def why_left_out(scan: Path, error: Exception) -> str:
    """Tell in one line why a scan is left out while others go on.

    Raises:
        Exception: The error itself, where it is a reason to stop.
    """
    if isinstance(error, CaseError):
        return str(error)
    if isinstance(error, ModelError):
        return f"{scan}: {error}"
    if out_of_memory(error):
        return f"{scan}: no memory for it; crop the scan, or take a machine with more"
    raise error
