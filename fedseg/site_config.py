"""The site config: built-in defaults < `site.toml` < `--node-config`; the study can't set it."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from fedseg.config import Scalar, readable
from fedseg.errors import ConfigError, DataError
from fedseg.registry import did_you_mean
from fedseg.sections import Section, kebab

__all__ = [
    "LabelMap",
    "PolicyConfig",
    "SiteConfig",
    "fedseg_home",
    "load_site_config",
    "valid_device",
    "valid_site_name",
]

_NAME = re.compile(r"[a-z0-9-]{1,32}")
_LABEL = {
    **{"0": 0, "1": 1, "2": 2},
    **{"background": 0, "liver": 1, "tumor": 2, "tumour": 2},
}
LabelMap = Mapping[int | str, int]
"""Mask value, or name in lower case, to label 0 background, 1 liver, 2 tumor."""

_FLOWER_KEYS = {"partition-id", "num-partitions", "site-config"}


def fedseg_home() -> Path:
    """Folder of caches, ledgers and keys, not of runs: `$FEDSEG_HOME`, else `~/.fedseg`."""
    return Path(os.environ.get("FEDSEG_HOME") or "~/.fedseg").expanduser().absolute()


def valid_site_name(name: str) -> bool:
    """Tell whether a name may appear in reports: `[a-z0-9-]{1,32}`."""
    return _NAME.fullmatch(name) is not None


def valid_device(name: str) -> bool:
    """Tell whether a device has a name we know: auto, cpu, cuda, cuda:N or mps."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name) is not None


def _regions(value: object) -> object:
    """Parse `"liver,tumor"` or `["liver", "tumor"]`."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        return value
    return tuple(part.strip() if isinstance(part, str) else part for part in value)


def _names(value: object) -> object:
    """Parse `"a,b"` of node-config, or `["a", "b"]` of site.toml."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names)]
Queries = Annotated[
    tuple[Literal["hello", "fingerprint", "train", "evaluate", "secagg"], ...] | None,
    BeforeValidator(_names),
]
Modes = Annotated[
    tuple[Literal["none", "central-dp", "local-dp", "record-dp"], ...] | None,
    BeforeValidator(_names),
]


def _label_map(value: object) -> object:
    """Parse `{"3" = 1, cancer = "tumor"}` of site.toml, or `"3:1,cancer:tumor"` of node-config."""
    pairs = value.items() if isinstance(value, Mapping) else None
    if isinstance(value, str):
        pairs = [part.rsplit(":", 1) for part in value.split(",")]  # type: ignore[assignment]
    if pairs is None:
        return value
    try:
        return {_mask_value(old): _LABEL[str(new).strip().lower()] for old, new in pairs}
    except (ValueError, KeyError):
        raise ValueError(
            'pairs of mask value and label 0, 1 or 2, as "3:1,4:2", or of names, as '
            '"liver:liver,cancer:tumor"'
        ) from None


def _mask_value(given: object) -> int | str:
    text = str(given).strip().lower()
    if not text:
        raise ValueError("no mask value")
    try:
        return int(text)
    except ValueError:
        return text


class PolicyConfig(Section):
    """What the site lets a study do; a study that asks for more is refused."""

    min_cases: int = Field(1, ge=1, description="fewest cases the site trains with")
    min_evaluation_cases: int = Field(
        1, ge=1, description="fewest held-out cases that metrics which leave stand for"
    )
    min_peers: int = Field(0, ge=0, description="fewest other sites a study has")
    max_bytes: int | None = Field(None, ge=1, description="most bytes of an update a round")
    metrics: Names = Field(
        None,
        description="numbers that may leave: names, what they begin with (liver), or training; "
        "empty: all",
    )
    queries: Queries = Field(
        None,
        description="what is answered: hello, fingerprint, train, evaluate, secagg; empty: all",
    )
    models: Names = Field(None, description="networks that are trained; empty: all")
    strategies: Names = Field(None, description="strategies of studies; empty: all")
    require_secure_aggregation: bool = Field(
        False, description="whether studies must have secure aggregation"
    )
    privacy_modes: Modes = Field(
        None,
        description="privacy.mode of studies: none, central-dp, local-dp, record-dp; empty: all",
    )
    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="largest privacy.max-epsilon of studies; with local-dp and record-dp the most "
        "that the site's data spends over all studies; empty: no limit",
    )
    min_noise: float | None = Field(
        None, gt=0, description="smallest privacy.noise-multiplier of studies; empty: no limit"
    )
    max_clip: float | None = Field(
        None, gt=0, description="largest norm that studies clip updates to; empty: no limit"
    )
    min_count: int = Field(
        5, ge=1, description="fewest cases or lesions a number of the fingerprint stands for"
    )
    fingerprint_min_cases: int = Field(
        1, ge=1, description="fewer cases share no fingerprint; the site still trains"
    )
    share_fingerprint: bool = Field(True, description="whether the fingerprint may leave")
    fingerprint_epsilon: float | None = Field(
        None,
        gt=0,
        description="epsilon of the fingerprint for each case, by Laplace noise; empty: no noise",
    )
    allow_custom_code: bool = Field(
        False, description="whether pkg.mod:function of a study may be imported"
    )


class SiteConfig(Section):
    """What a node knows about its own data and allows."""

    name: str | None = Field(None, description="[a-z0-9-], 32 at most; a registered name wins")
    data_dir: str | None = Field(None, description="folder of the site's cases")
    layout: str = Field("auto", description="auto, images-masks, lits, msd, nnunet, bids, dicom")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    cache_dir: str | None = Field(None, description="preprocessed cases; empty: ~/.fedseg/cache")
    labels: Annotated[tuple[Literal["liver", "tumor"], ...], BeforeValidator(_regions)] = Field(
        ("liver", "tumor"), description="regions the site annotates"
    )
    label_map: Annotated[dict[int | str, int] | None, BeforeValidator(_label_map)] = Field(
        None, description="mask value or name to label where they differ from 0, 1, 2"
    )
    modality: Literal["auto", "ct", "mr"] = Field(
        "auto", description="auto: CT where a scan has voxels under -200"
    )
    study_key: str | None = Field(
        None,
        min_length=16,
        description="secret agreed among the sites, not the server: finds scans two sites hold",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; empty: all the node has")
    signing_key: str | None = Field(
        None, description="PEM file of an Ed25519 key: signs the keys of secure aggregation"
    )
    peers: dict[str, str] | None = Field(
        None,
        description="[peers] table, name to Ed25519 public key: secure aggregation with no other",
    )
    ledger: str | None = Field(
        None, description="file of what left the site; empty: ledger.jsonl in cache-dir"
    )
    policy: PolicyConfig = Field(default_factory=PolicyConfig)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not valid_site_name(name):
            raise ValueError("a name of a-z, 0-9 and -, 32 characters at most")
        return name

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not valid_device(device):
            raise ValueError("auto, cpu, cuda, cuda:N or mps")
        return device

    @field_validator("labels")
    @classmethod
    def _liver_is_there(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if "liver" not in labels:
            raise ValueError('"liver" or "liver,tumor"')
        return labels

    @property
    def cache(self) -> Path:
        """Absolute folder for preprocessed cases and state between rounds."""
        named = Path(self.cache_dir).expanduser().absolute() if self.cache_dir else None
        return named or fedseg_home() / "cache"

    @property
    def ledger_file(self) -> Path:
        """Absolute path of the ledger of what left the site."""
        named = Path(self.ledger).expanduser().absolute() if self.ledger else None
        return named or self.cache / "ledger.jsonl"


def load_site_config(
    node_config: Mapping[str, Scalar], *, folder: Path | None = None
) -> SiteConfig:
    """Merge defaults, `site.toml` and node-config.

    Args:
        node_config: What Flower's `--node-config` carries; `policy.*` keys are flat.
        folder: The site's folder when node-config has no `data-dir` (a simulated sub-folder).

    Raises:
        ConfigError: A key is unknown, or a value has a wrong type or is impossible.
        DataError: A named `site-config` can't be read.
    """
    given = node_config.get("data-dir")
    data_dir = folder or (_path("data-dir", given) if given else None)
    named = node_config.get("site-config")
    merged: dict[str, Any] = {}
    if named:
        merged = _read_toml(_path("site-config", named))
    elif data_dir is not None and os.path.isfile(data_dir / "site.toml"):
        merged = _read_toml(data_dir / "site.toml")
    for key, value in node_config.items():
        if key in _FLOWER_KEYS:
            continue
        section, _, name = key.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if not isinstance(target, dict):
            raise ConfigError(f"{section}: got {target!r}; expected a table [{section}]")
        target[name] = value
    if folder is not None:
        merged["data-dir"] = str(folder)
    _check_keys(merged, SiteConfig)
    for key in ("data-dir", "cache-dir", "ledger", "signing-key"):
        _path(key, merged.get(key, ""))
    if isinstance(merged.get("policy"), dict):
        _check_keys(merged["policy"], PolicyConfig, prefix="policy.")
    try:
        return SiteConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(readable(error)) from None


def _path(key: str, given: object) -> Path:
    try:
        return Path(str(given)).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key}: got '{given}', no such user here; give a whole path") from None


def _check_keys(given: Iterable[str], section: type[Section], *, prefix: str = "") -> None:
    known = {prefix + kebab(name) for name in section.model_fields}
    for key in (prefix + key for key in given):
        if key not in known:
            raise ConfigError(
                f"{key}: unknown key of the site config{did_you_mean(key, known)}; expected "
                f"{', '.join(sorted(known))}"
            )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); check site-config") from None
    except (ValueError, RecursionError) as error:  # of TOML, UTF-8, a path with a null, or depth
        raise ConfigError(f"{path}: not valid TOML ({error}); mend the line") from None
