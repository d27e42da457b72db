"""Tests of the study config, and that pyproject.toml and docs/configuration.md say the same."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tomli
from pydantic import ValidationError

from fedseg.config import StudyConfig, describe
from fedseg.errors import ConfigError
from fedseg.site_config import PolicyConfig, SiteConfig

ROOT = Path(__file__).parents[1]
DEFAULTS = {key: default for key, default, _ in describe()}


def pyproject() -> dict[str, Any]:
    return tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": v for section, part in nested.items() for key, v in part.items()}


def test_defaults_written_as_toml_give_the_defaults() -> None:
    assert StudyConfig.from_run_config({}) == StudyConfig()
    assert StudyConfig.from_run_config(DEFAULTS) == StudyConfig()  # type: ignore[arg-type]
    assert all(isinstance(value, (str, int, float, bool)) for value in DEFAULTS.values())
    assert all(text for _, _, text in describe())


def test_values_arrive_typed() -> None:
    config = StudyConfig.from_run_config(
        {
            "train.patch-size": "96, 64,32",
            "train.spacing": "1.5,2,3",
            "train.learning-rate": 1,
            "train.steps-per-epoch": 7,
            "federation.sites": 3,
            "train.inference-patch": "8,8,8",
        }
    )
    assert config.train.patch_size == (96, 64, 32)
    assert config.train.spacing == (1.5, 2.0, 3.0)
    assert config.train.learning_rate == 1.0
    assert config.train.steps_per_epoch == 7
    assert config.federation.sites == "3"
    assert config.train.inference_patch == (8, 8, 8)


@pytest.mark.parametrize("key", [key for key, default in DEFAULTS.items() if default == ""])
def test_empty_text_means_unset(key: str) -> None:
    assert StudyConfig.from_run_config({key: ""}) == StudyConfig()


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("train.batch-size", 0, "train.batch-size: got 0; expected at least 1"),
        ("train.batch-size", 2.5, "train.batch-size: got 2.5; expected a"),
        ("train.batch-size", "two", "train.batch-size: got 'two'; expected a"),
        ("train.batch-size", True, "train.batch-size: got True; expected a"),
        ("train.learning-rate", "fast", "train.learning-rate: got 'fast'; expected a number"),
        ("train.learning-rate", 0, "train.learning-rate: got 0; expected greater than 0"),
        ("train.learning-rate", float("nan"), "train.learning-rate: got nan"),
        ("train.foreground", 1.1, "train.foreground: got 1.1; expected at most 1"),
        ("train.momentum", 1.0, "train.momentum: got 1.0; expected less than 1"),
        ("federation.guard", "yes", "federation.guard: got 'yes'; expected a boolean"),
        (
            "train.patch-size",
            "64,64",
            "train.patch-size: got '64,64'; expected 3 numbers separated",
        ),
        ("train.patch-size", "64,64,x", "train.patch-size: got '64,64,x'; expected 3 numbers"),
        ("train.patch-size", "64,64,6.5", "expected 3 numbers separated by commas"),
        ("train.spacing", "3,0,3", "train.spacing: got .*; expected sizes over 0 mm"),
        ("train.ct-window", "250,-150", "train.ct-window: got 250.0,-150.0; expected lower,upper"),
        ("train.mr-percentiles", "99,1", "train.mr-percentiles: got 99.0,1.0; expected lower"),
        ("train.optimizer", "adam", "train.optimizer: got 'adam'; expected 'adamw' or 'sgd'"),
        ("train.optimizer-state", "drop", "expected 'reset' or 'keep'"),
        ("train.schedule", "step", "train.schedule: got 'step'; expected 'constant', 'cosine'"),
        ("train.precision", "fp64", "train.precision: got 'fp64'; expected 'auto', 'fp32', "),
        ("train.backend", "jax", "train.backend: got 'jax'; expected 'torch'"),
        (
            "train.learning-rat",
            1,
            "train.learning-rat: unknown key, did you mean 'train.learning-r",
        ),
        ("train.batch_size", 1, "train.batch_size: unknown key, did you mean 'train.batch-size'"),
        ("quark.spin", 1, "quark.spin: unknown key; remove it from pyproject.toml"),
        ("seed", 1, "seed: unknown key"),
        ("model.depth", 1, "model.depth: got 1; expected at least 2"),
        ("model.width", 1000, "model.width: got 1000; expected at most 256"),
        (
            "train.patch-size",
            "0,64,64",
            r"train.patch-size: got \(0, 64, 64\); expected at least 1",
        ),
        ("train.spacing", "nan,1,1", r"train.spacing\.0: got nan; expected a finite"),
        ("train.mr-percentiles", "-5,200", "train.mr-percentiles: got .*; expected 0 to 100"),
        ("train.learning-rate", float("inf"), "train.learning-rate: got inf; expected a finite"),
        ("federation.rounds", 0, "federation.rounds: got 0; expected at least 1"),
        ("federation.round-deadline", 0, "federation.round-deadline: got 0; expected greater"),
        ("federation.sites", True, "federation.sites: got True; expected a string"),
        ("federation.compression", "zstd", "federation.compression: got 'zstd'; expected 'none'"),
        ("privacy.mode", "global-dp", "privacy.mode: got 'global-dp'; expected 'none', 'central-"),
        ("privacy.mode", "central-dp", 'privacy.clip: got "" with privacy.mode = "central-dp"; ex'),
        ("privacy.noise-multiplier", 1, "privacy.noise-multiplier: got 1 with .*; expected a mode"),
        ("privacy.clip", 0, "privacy.clip: got 0; expected greater than 0"),
        ("privacy.delta", 1.0, "privacy.delta: got 1.0; expected less than 1"),
        ("privacy.case-rate", 1.5, "privacy.case-rate: got 1.5; expected at most 1"),
        ("privacy.secure-aggregation", 1, "privacy.secure-aggregation: got 1; expected"),
        ("privacy.secagg-threshold", 0.4, "privacy.secagg-threshold: got 0.4; expected at least"),
        ("data.source", "lits", "data.source: got 'lits'; expected 'phantom' or 'folder'"),
        ("data.partition", "random", "data.partition: got 'random'; expected 'iid', 'size'"),
        ("data.partition", "folders", "data.partition: got 'folders' with data.source = \"phantom"),
        ("data.source", "folder", 'data.dir: got "" with data.source = "folder"; expected a'),
        ("data.dirichlet-alpha", 0, "data.dirichlet-alpha: got 0; expected greater than 0"),
        ("output.dir", "", "output.dir: got ''; expected"),
    ],
)
def test_errors_name_key_got_and_expected(key: str, value: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as caught:
        StudyConfig.from_run_config({key: value})
    assert "\n" not in str(caught.value)


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.from_run_config({"train.batch-size": 0, "model.depth": 9, "data.seed": -1})
    keys = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert keys == {"train.batch-size", "model.depth", "data.seed"}


def test_names_from_outside_are_left_for_later() -> None:
    names = {"model.name": "a.b:c", "train.loss": "d:e", "federation.strategy": "f:g"}
    config = StudyConfig.from_run_config({**names, "federation.weighting": "h:i"})
    assert config.model.name == "a.b:c"
    assert config.federation.weighting == "h:i"


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        StudyConfig().train.batch_size = 3  # type: ignore[misc]


def other(value: Any) -> list[Any]:
    """Values that differ from a default; the right one of them is valid."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value / 2, 0.5]
    if value == "":
        return ["7", 7, "7,7,7", "1,7"]
    return ["16,16,16", "1,2", "adamw:x", "sgd", "keep", "cosine", "poly", "fp32", "size", "native"]


def test_digest_covers_all_but_output() -> None:
    base = StudyConfig.from_run_config({})
    fixed = set()
    for key, default in DEFAULTS.items():
        for value in other(default):
            try:
                changed = StudyConfig.from_run_config({key: value})
            except ConfigError:
                continue
            if changed == base:
                continue
            assert (changed.digest() == base.digest()) == key.startswith("output."), key
            break
        else:
            fixed.add(key)
    # These have one value only, so far, or need a second key.
    assert fixed == {
        "data.source",
        "train.augmentation",
        "train.backend",
        "federation.compression",
        "federation.download",
        "federation.late",
        "federation.shared",
        "privacy.mode",
        "privacy.noise-multiplier",
    }
    assert base.digest() == StudyConfig().digest()
    assert re.fullmatch("[0-9a-f]{64}", base.digest())


def test_pyproject_ships_every_key_and_only_valid_values() -> None:
    shipped = flat(pyproject()["tool"]["flwr"]["app"]["config"])
    assert sorted(shipped) == sorted(DEFAULTS)
    StudyConfig.from_run_config(shipped)
    for key, value in shipped.items():
        assert type(value) is type(DEFAULTS[key]), key
        if not key.startswith(("train.", "federation.")):  # the shipped recipe may differ there
            assert value == DEFAULTS[key], key


def _names(requirements: list[str]) -> list[str]:
    return sorted(re.split(r"[\[<>=!~; ]", line)[0] for line in requirements)


def test_uv_overrides_name_every_dependency_once() -> None:
    content = pyproject()
    project, overrides = content["project"], content["tool"]["uv"]["override-dependencies"]
    wanted = project["dependencies"] + list(chain(*project["optional-dependencies"].values()))
    assert _names(overrides) == sorted(set(_names(wanted)))
    assert all(line.endswith(" ; sys_platform == 'never'") for line in overrides)


def documented_rows() -> list[tuple[str, str]]:
    """Key and default of the rows ``| `key` | `default` | ...``."""
    lines = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    return [(row[0].removeprefix("| ").strip("`"), row[1].strip("`")) for row in rows]


def test_configuration_page_lists_each_study_key_once_with_its_default() -> None:
    sections = tuple(f"{section}." for section in StudyConfig.model_fields)
    rows = [row for row in documented_rows() if row[0].startswith(sections)]
    assert sorted(rows) == sorted((key, json.dumps(value)) for key, value in DEFAULTS.items())


def test_configuration_page_lists_each_site_key_once() -> None:
    kebab = [name.replace("_", "-") for name in SiteConfig.model_fields if name != "policy"]
    policy = [f"[policy] {name.replace('_', '-')}" for name in PolicyConfig.model_fields]
    keys = [key for key, _ in documented_rows()]
    assert [keys.count(key) for key in kebab + policy] == [1] * (len(kebab) + len(policy))
