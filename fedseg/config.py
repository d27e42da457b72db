"""The study config: Flower's run config, parsed once into frozen, typed, validated sections."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedseg.errors import ConfigError
from fedseg.registry import did_you_mean

__all__ = [
    "DataConfig",
    "FederationConfig",
    "ModelConfig",
    "OutputConfig",
    "PrivacyConfig",
    "Section",
    "StudyConfig",
    "TrainConfig",
    "describe",
    "readable",
]

Scalar = str | int | float | bool


def kebab(name: str) -> str:
    """Turn a field name into the key a user types."""
    return name.replace("_", "-")


def _numbers(kind: type, count: int) -> Callable[[object], object]:
    """Make a parser for `"64,64,64"`: Flower's run config has scalars only."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = value.split(",")
        if len(parts) != count:
            raise ValueError(f"{count} numbers separated by commas")
        try:
            return tuple(kind(part) for part in parts)
        except ValueError:
            raise ValueError(f"{count} numbers separated by commas") from None

    return parse


def _as_text(value: object) -> object:
    """Let `federation.sites = 3` and `= "a,b"` both be text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Voxels = Annotated[tuple[int, int, int], BeforeValidator(_numbers(int, 3))]
Millimetres = Annotated[tuple[float, float, float], BeforeValidator(_numbers(float, 3))]
Pair = Annotated[tuple[float, float], BeforeValidator(_numbers(float, 2))]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of the config sections: kebab-case keys, `""` means unset, nothing unknown."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=kebab,
        populate_by_name=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        """Drop optional keys that ship as `""`: TOML has no null, Flower refuses absent keys."""
        if not isinstance(values, dict):
            return values
        optional = {kebab(n) for n, f in cls.model_fields.items() if f.default is None}
        return {k: v for k, v in values.items() if not (v == "" and kebab(k) in optional)}


class DataConfig(Section):
    """Where simulated sites get their cases; a real site ignores this section."""

    source: Literal["phantom", "folder"] = Field("phantom", description="cases of simulated sites")
    dir: str | None = Field(None, description='the folder of `data.source = "folder"`')
    partition: Literal["iid", "size", "dirichlet", "folders"] = Field(
        "iid",
        description="how cases go to simulated sites: equal shares, unequal shares, unequal tumour "
        "load, or one sub-folder a site",
    )
    dirichlet_alpha: Positive = Field(0.5, description="smaller: more unequal (size, dirichlet)")
    seed: int = Field(0, ge=0, description="seed of phantoms and partition")
    phantom_kinds: str = Field(
        "portal,arterial,native", description="kinds of phantom, one a site in turn"
    )
    phantom_cases: int = Field(12, ge=1, le=10_000, description="phantoms a simulated site has")
    server_cases: int = Field(
        2, ge=0, description="held-out phantoms a kind at the server (global metrics)"
    )
    server_dir: str | None = Field(
        None, description="folder of held-out cases at the server (global metrics)"
    )

    @model_validator(mode="after")
    def _folder_needs_dir(self) -> "DataConfig":
        if self.source == "folder" and self.dir is None:
            raise ValueError('data.dir: got "" with data.source = "folder"; expected a folder')
        if self.partition == "folders" and self.source != "folder":
            raise ValueError(
                "data.partition: got 'folders' with data.source = \"phantom\"; "
                'expected data.source = "folder"'
            )
        return self


class ModelConfig(Section):
    """The network."""

    name: str = Field("unet", description="unet, attention-unet, unet++ or pkg.mod:function")
    width: int = Field(16, ge=2, le=256, description="channels of the first level, doubled a level")
    depth: int | None = Field(
        None, ge=2, le=7, description="levels of resolution; empty: planned; unet++ has 5"
    )
    init_from: str | None = Field(None, description="start from this .safetensors of fedseg")


class TrainConfig(Section):
    """What every site does in a round, and the plan it preprocesses with."""

    seed: int = Field(0, ge=0, description="seed of initial weights, patches and augmentation")
    local_epochs: int = Field(1, ge=1, description="passes over the site's cases a round")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="optimiser steps an epoch; empty: `patches-per-case` decides"
    )
    patches_per_case: int = Field(4, ge=1, description="patches an epoch takes from a case")
    batch_size: int | None = Field(None, ge=1, description="patches a step; empty: planned")
    patch_size: Voxels | None = Field(
        None, description="patch in voxels, x,y,z; empty: planned for the smallest device"
    )
    spacing: Millimetres | None = Field(
        None, description="voxel size in mm, x,y,z; empty: planned from the sites' fingerprints"
    )
    ct_window: Pair | None = Field(
        None, description="CT is clipped to this window, HU; empty: planned from the liver's HU"
    )
    mr_percentiles: Pair = Field((1.0, 99.0), description="MR is clipped to these percentiles")
    inference_patch: Voxels | None = Field(
        None, description="sliding window in voxels; empty: patch-size"
    )
    loss: str = Field("dice-ce", description="dice-ce or pkg.mod:function")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="local optimiser")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="moments between rounds: start anew, or kept on the site's disk"
    )
    learning_rate: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled for adamw, L2 for sgd")
    momentum: Fraction = Field(0.9, description="of sgd (Nesterov)")
    schedule: Literal["constant", "cosine", "poly"] = Field(
        "cosine", description="learning rate over the whole run, not a round"
    )
    warmup: Fraction = Field(0.0, description="share of the run with a rising learning rate")
    max_grad_norm: float = Field(12.0, ge=0, description="gradient norm is clipped to it; 0: off")
    foreground: Annotated[float, Field(ge=0, le=1)] = Field(
        0.67, description="share of patches centred on a labelled voxel, half of them on tumour"
    )
    augmentation: bool = Field(True, description="random flips and intensity changes")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="number format of the forward pass; auto: bf16 where the device has it"
    )
    validation_fraction: Fraction = Field(
        0.2, description="share of a site's cases held out for federated metrics"
    )
    backend: Literal["torch"] = Field("torch", description="training loop")

    @model_validator(mode="after")
    def _in_order(self) -> "TrainConfig":
        for key, pair in (
            ("train.ct-window", self.ct_window),
            ("train.mr-percentiles", self.mr_percentiles),
        ):
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"{key}: got {pair[0]},{pair[1]}; expected lower,upper")
        if not 0 <= self.mr_percentiles[0] < self.mr_percentiles[1] <= 100:
            raise ValueError(f"train.mr-percentiles: got {self.mr_percentiles}; expected 0 to 100")
        for key, size in (
            ("train.patch-size", self.patch_size),
            ("train.inference-patch", self.inference_patch),
        ):
            if size is not None and min(size) < 1:
                raise ValueError(f"{key}: got {size}; expected at least 1 voxel")
        if self.spacing is not None and not min(self.spacing) > 0:
            raise ValueError(f"train.spacing: got {self.spacing}; expected sizes over 0 mm")
        return self


class FederationConfig(Section):
    """Rounds, strategy and which sites take part."""

    rounds: int = Field(6, ge=1, description="rounds of training")
    strategy: str = Field("fedavg", description="fedavg, fedprox or pkg.mod:function")
    proximal_mu: float = Field(0.01, ge=0, description="weight of fedprox's proximal term")
    weighting: str = Field("cases", description="cases, patches, equal or pkg.mod:function")
    sites: Annotated[str, BeforeValidator(_as_text)] = Field(
        "", description="names (a,b) or how many to expect; empty: all simulated, else min-sites"
    )
    min_sites: int = Field(2, ge=1, description="fewer good updates than this end the run")
    connect_deadline: Positive = Field(120.0, description="seconds to wait for sites")
    round_deadline: Positive = Field(3600.0, description="seconds a site has for one round")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; last one always")
    compression: Literal["none"] = Field("none", description="of updates")
    shared: Literal["all"] = Field("all", description="which parameters are averaged")


class PrivacyConfig(Section):
    """Protection of updates."""

    mode: Literal["none"] = Field("none", description="differential privacy")
    secure_aggregation: Literal[False] = Field(False, description="server sees only the sum")


class OutputConfig(Section):
    """What a run leaves."""

    dir: str = Field("~/.fedseg/runs", min_length=1, description="run folders go here")
    resume: Literal[""] = Field("", description="not yet available")


class StudyConfig(Section):
    """The whole study config."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Scalar]) -> "StudyConfig":
        """Parse Flower's flat run config (`{"train.seed": 0, ...}`).

        Raises:
            ConfigError: A key is unknown, or a value has a wrong type or is impossible; one line
                for each.
        """
        known = {key for key, _, _ in describe()}
        for key in run_config:
            if key not in known:
                raise ConfigError(
                    f"{key}: unknown key{did_you_mean(key, known)}; remove it from pyproject.toml"
                )
        nested: dict[str, dict[str, Scalar]] = {}
        for key, value in run_config.items():
            section, _, name = key.partition(".")
            nested.setdefault(section, {})[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(readable(error)) from None

    def digest(self) -> str:
        """SHA-256 over all that sites and server must agree on: everything but `output`."""
        content = json.dumps(self.model_dump(mode="json", exclude={"output"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def describe() -> Iterable[tuple[str, object, str]]:
    """List every key of the study config: `(key, default as TOML value, description)`."""
    rows = []
    for section, field in StudyConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name, option in field.annotation.model_fields.items():
            rows.append((f"{section}.{kebab(name)}", _as_toml(option.default), option.description))
    return [(key, default, text or "") for key, default, text in rows]


def _as_toml(value: object) -> object:
    """Write a default as the scalar it has in pyproject.toml."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return value


def readable(error: ValidationError, *, prefix: str = "") -> str:
    """Turn pydantic's report into lines of `key: got X; expected Y`."""
    lines = []
    for item in error.errors():
        key = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and ": " in message:
            lines.append(message)
            continue
        for wordy, short in _SHORTER.items():
            message = message.replace(wordy, short)
        got = "nothing" if item["type"] == "missing" else repr(item["input"])
        lines.append(f"{key}: got {got}; expected {message}")
    return "\n".join(lines)


_SHORTER = {
    "Input should be ": "",
    "a valid ": "a ",
    "less than or equal to": "at most",
    "greater than or equal to": "at least",
    "Extra inputs are not permitted": "no such key",
    "Field required": "a value",
    "a integer": "an integer",
}
