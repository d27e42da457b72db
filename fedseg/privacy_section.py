"""The section `privacy.*` of the study config."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedseg.sections import Positive, Section

__all__ = ["PrivacyConfig"]


class PrivacyConfig(Section):
    """Protection of updates."""

    mode: Literal["none", "central-dp", "local-dp", "record-dp"] = Field(
        "none",
        description="differential privacy: noise on the sum of a round, on each site's update, or "
        "on each step of training, where it hides a case",
    )
    clip: Positive | None = Field(
        None,
        description="L2 norm that a site's update, with record-dp a case's gradient, is clipped "
        "to; empty: no clipping",
    )
    noise_multiplier: Positive | None = Field(
        None, description="standard deviation of the noise, as a multiple of `clip`"
    )
    case_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="record-dp: chance of each case to be in a step, drawn in secret"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="probability with which epsilon needn't hold: far below 1 / members"
    )
    max_epsilon: Positive | None = Field(
        None, description="the run ends before epsilon would pass it; empty: no budget"
    )
    force: bool = Field(
        False, description="run although `fedseg privacy plan` calls the settings absurd"
    )
    secure_aggregation: bool = Field(
        False, description="the server sees only sums of updates and scores; from 3 sites on"
    )
    secagg_threshold: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.6, description="a round's sum needs more than this share of its sites"
    )
    secagg_clip: Positive = Field(
        1.0, description="with secure aggregation a site's change of a weight is clipped to it"
    )
    secagg_max_weight: Positive = Field(
        1000.0, description="largest weight a site may have (cases, or as federation.weighting)"
    )
    secagg_max_norm: Positive | None = Field(
        None, description="a site scales an update of larger L2 norm down to it; empty: no bound"
    )

    @model_validator(mode="after")
    def _noise_goes_with_a_mode(self) -> "PrivacyConfig":
        for key, value in (("clip", self.clip), ("noise-multiplier", self.noise_multiplier)):
            if self.mode != "none" and value is None:
                raise ValueError(
                    f'privacy.{key}: got "" with privacy.mode = "{self.mode}"; expected a number'
                )
        if self.mode == "none" and self.noise_multiplier is not None:
            raise ValueError(
                f"privacy.noise-multiplier: got {self.noise_multiplier:g} with privacy.mode = "
                '"none", which adds no noise; expected a mode'
            )
        return self
