"""Sections of the study config: one class each, a description for every key."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "DataConfig",
    "FederationConfig",
    "ModelConfig",
    "OutputConfig",
    "Section",
    "TrainConfig",
    "kebab",
]


def kebab(name: str) -> str:
    """Turn a field name into the key a user types."""
    return name.replace("_", "-")


def _numbers(kind: type, count: int) -> Callable[[object], object]:
    """Make a parser for `"64,64,64"`: Flower's run config has scalars only."""

    def parse(value: object) -> object:
        if isinstance(value, list):  # as it is in config.json
            return tuple(value)
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
    init_from: str | None = Field(
        None,
        description="start from a run (its best model), a .safetensors, a MONAI bundle, a .pt or "
        "demo; empty: from the seed",
    )
    init_partial: bool = Field(
        False, description="let weights that `init-from` lacks or that don't fit start anew"
    )


class TrainConfig(Section):
    """What every site does in a round, and the plan it preprocesses with."""

    seed: int = Field(0, ge=0, description="seed of initial weights, patches and augmentation")
    local_epochs: int = Field(1, ge=1, description="passes over the site's cases a round")
    minutes: Positive | None = Field(
        None,
        description="a site's round takes so many minutes, and its update counts by its mean step "
        "(FedNova); empty: steps decide",
    )
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
    augmentation: Literal["none", "light", "full", "nnunet"] = Field(
        "light",
        description="random changes of patches: brightness, contrast, noise; full: also rotation, "
        "scale, blur, gamma and low resolution; nnunet: with nnU-Net's probabilities and flips",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="number format of the forward pass; auto: bf16 where the device has it, fp16 "
        "on a GPU without, else fp32",
    )
    validation_fraction: Fraction = Field(
        0.2, description="share of a site's cases held out for federated metrics"
    )
    backend: Literal["torch", "lightning"] = Field("torch", description="training loop")
    lightning: str = Field(
        "",
        description="options of Lightning's Trainer: accelerator, precision, deterministic, "
        'benchmark, such as "precision=16-mixed"; empty: by the site\'s device',
    )

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
    strategy: str = Field(
        "fedavg",
        description="fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, fednova, fedmedian, "
        "fedtrimmedavg, krum, multikrum, bulyan, qfedavg or pkg.mod:function",
    )
    proximal_mu: float = Field(0.01, ge=0, description="weight of fedprox's proximal term")
    server_learning_rate: Positive | None = Field(
        None, description="of fedavgm, fedadam, fedyogi, fedadagrad; empty: a safe one for each"
    )
    server_momentum: Fraction = Field(0.5, description="of fedavgm; beta 1 of fedadam, fedyogi")
    malicious_sites: int = Field(
        1, ge=0, description="sites that krum, multikrum and bulyan must survive"
    )
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="share that fedtrimmedavg leaves out at each end"
    )
    q: float = Field(0.2, ge=0, description="of qfedavg: larger favours sites with a larger loss")
    weighting: str = Field(
        "cases",
        description="cases, patches, voxels, equal, inverse-steps, annotated or pkg.mod:function",
    )
    sites: Annotated[str, BeforeValidator(_as_text)] = Field(
        "", description="names (a,b) or how many to expect; empty: all simulated, else min-sites"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the sites, drawn anew each round"
    )
    min_sites: int = Field(2, ge=1, description="fewer good updates than this end the run")
    connect_deadline: Positive = Field(120.0, description="seconds to wait for sites")
    round_deadline: Positive = Field(3600.0, description="seconds a site has for one round")
    late: Literal["drop", "carry"] = Field(
        "drop", description="updates after the deadline: dropped, or averaged in the next round"
    )
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; last one always")
    monitor: str = Field(
        "", description="metric of the best model, e.g. federated.liver.dice; empty: mean Dice"
    )
    patience: int | None = Field(
        None, ge=1, description="evaluations without a better model that end the run; empty: none"
    )
    guard: bool = Field(True, description="leave out updates of odd norm or direction")
    guard_norm: Annotated[float, Field(gt=1)] = Field(
        10.0, description="most times the median norm that an update may have"
    )
    guard_opposition: float = Field(
        1.5,
        ge=0,
        description="rounds of opposition to the others' direction that are too many; 0: off",
    )
    guard_probe: float | None = Field(
        None, ge=0, description="share by which one update may raise the loss on the server's cases"
    )
    parole: int = Field(2, ge=1, description="good updates in a row that stay out after a bad one")
    compression: Literal["none", "fp16", "int8", "int4", "top-k"] = Field(
        "none", description="of updates"
    )
    top_k: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="share of the values that top-k compression sends"
    )
    download: Literal["fp32", "fp16"] = Field("fp32", description="number format to the sites")
    shared: Literal["all", "all-but-norm", "all-but-head"] = Field(
        "all", description="which parameters are averaged (all-but-norm: FedBN); others stay local"
    )
    personal: bool = Field(
        True, description="at the end a site keeps its own model where it is better on its cases"
    )


class OutputConfig(Section):
    """What a run leaves."""

    dir: str = Field("~/.fedseg/runs", min_length=1, description="run folders go here")
    resume: str = Field("", description="id or folder of a run to go on with")
    trackers: str = Field(
        "",
        description="who else gets each round's numbers: tensorboard, mlflow, wandb or "
        "pkg.mod:function, several with commas; empty: nobody",
    )
