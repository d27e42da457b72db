"""The study config: Flower's run config, parsed once into frozen, typed, validated sections."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from pydantic import Field, ValidationError

from fedseg.errors import ConfigError
from fedseg.privacy_section import PrivacyConfig
from fedseg.registry import did_you_mean
from fedseg.sections import (
    DataConfig,
    FederationConfig,
    ModelConfig,
    OutputConfig,
    Section,
    TrainConfig,
    kebab,
)

__all__ = ["Scalar", "StudyConfig", "describe", "readable"]

Scalar = str | int | float | bool


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

    @classmethod
    def from_json(cls, text: str) -> "StudyConfig":
        """Read what `model_dump_json(by_alias=True)` wrote.

        Raises:
            ConfigError: It is damaged or of another version.
        """
        try:
            return cls.model_validate_json(text)
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
