"""The plan: what every site preprocesses with, made once by the server and sent with each task."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedseg.config import StudyConfig, readable
from fedseg.errors import ConfigError

__all__ = ["CLASSES", "MAX_PLAN_BYTES", "REGIONS", "Plan"]

CLASSES = 3
"""Background, liver, tumor."""

REGIONS = {"liver": 1, "tumor": 2}
"""Region name to its lowest label: `liver` is label >= 1, `tumor` label 2 (LiTS)."""

MAX_PLAN_BYTES = 64 * 1024

_Size = Annotated[int, Field(ge=1, le=1024)]
_Spacing = Annotated[float, Field(gt=0, le=100)]
_Bound = Annotated[float, Field(ge=-1e6, le=1e6)]


class Plan(BaseModel):
    """Everything a site needs to turn a scan into network input and back.

    Attributes:
        spacing: Voxel size in mm, in RAS axis order.
        ct_window: HU to which CT is clipped; its middle becomes 0, its ends -2 and 2.
        mr_percentiles: Percentiles inside the body which MR maps to -2 and 2.
        patch_size: Training patch in voxels.
        batch_size: Patches a step.
        inference_patch: Sliding window in voxels.
        model: Name of the network, built-in or `pkg.mod:function`.
        width: Channels of the first level.
        depth: Number of levels.
        reasons: Why each planned value is as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spacing: tuple[_Spacing, _Spacing, _Spacing]
    ct_window: tuple[_Bound, _Bound]
    mr_percentiles: tuple[float, float]
    patch_size: tuple[_Size, _Size, _Size]
    batch_size: int = Field(ge=1, le=1024)
    inference_patch: tuple[_Size, _Size, _Size]
    model: str = Field(max_length=256)
    width: int = Field(ge=2, le=256)
    depth: int = Field(ge=2, le=7)
    reasons: dict[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=512)]] = (
        Field(default_factory=dict, max_length=16)
    )

    @model_validator(mode="after")
    def _in_order(self) -> "Plan":
        low, high = self.mr_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"plan.mr_percentiles: got {low},{high}; expected lower,upper in 0 to 100"
            )
        if self.ct_window[0] >= self.ct_window[1]:
            raise ValueError(f"plan.ct_window: got {self.ct_window}; expected lower,upper")
        return self

    @classmethod
    def from_config(
        cls,
        config: StudyConfig,
        *,
        spacing: tuple[float, float, float],
        ct_window: tuple[float, float],
        patch_size: tuple[int, int, int],
        batch_size: int,
        depth: int,
        reasons: dict[str, str] | None = None,
    ) -> "Plan":
        """Join what was planned and what the study config says of the rest.

        Raises:
            ConfigError: A size, spacing or range is impossible.
        """
        try:
            return cls(
                spacing=spacing,
                ct_window=ct_window,
                mr_percentiles=config.train.mr_percentiles,
                patch_size=patch_size,
                batch_size=batch_size,
                inference_patch=config.train.inference_patch or patch_size,
                model=config.model.name,
                width=config.model.width,
                depth=depth,
                reasons=reasons or {},
            )
        except ValidationError as error:
            raise ConfigError(readable(error, prefix="plan.")) from None

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan that came over the wire or out of a file.

        Raises:
            ConfigError: It is too long, no JSON, or has impossible values.
        """
        if len(text.encode()) > MAX_PLAN_BYTES:
            raise ConfigError(f"plan: got more than {MAX_PLAN_BYTES} bytes; expected a plan.json")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(readable(error, prefix="plan.")) from None

    def to_json(self) -> str:
        """Write the plan for a person to read."""
        return self.model_dump_json(indent=2)
