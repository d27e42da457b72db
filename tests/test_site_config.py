"""Tests of the site config."""

from pathlib import Path
from typing import Any

import pytest

from fedseg.errors import ConfigError, DataError
from fedseg.site_config import (
    SiteConfig,
    fedseg_home,
    load_site_config,
    valid_device,
    valid_site_name,
)


def from_toml(folder: Path, text: str, node_config: dict[str, Any] | None = None) -> SiteConfig:
    (folder / "site.toml").write_text(text)
    return load_site_config({"data-dir": str(folder), **(node_config or {})})


def test_defaults() -> None:
    config = load_site_config({})
    assert config == SiteConfig()
    assert config.labels == ("liver", "tumor")
    assert (config.modality, config.device, config.layout) == ("auto", "auto", "auto")
    assert config.policy.allow_custom_code is False
    assert config.policy.max_bytes is None


def test_every_key_of_the_file(tmp_path: Path) -> None:
    config = from_toml(
        tmp_path,
        'name = "aachen"\nlayout = "images-masks"\ndevice = "cuda:1"\ncache-dir = "/x"\n'
        'labels = "liver"\nmodality = "mr"\nthreads = 4\nlabel-map = {"6" = 1, "7" = 2}\n'
        "[policy]\nmin-cases = 3\nmax-bytes = 100\nallow-custom-code = true\n",
    )
    assert config.name == "aachen"
    assert config.device == "cuda:1"
    assert config.cache == Path("/x")
    assert config.labels == ("liver",)
    assert config.threads == 4
    assert config.label_map == {6: 1, 7: 2}
    assert config.policy.model_dump() == {
        "min_cases": 3,
        "max_bytes": 100,
        "allow_custom_code": True,
        "min_count": 5,
        "fingerprint_min_cases": 1,
        "share_fingerprint": True,
        "fingerprint_epsilon": None,
        "min_evaluation_cases": 1,
        "min_peers": 0,
        "metrics": None,
        "queries": None,
        "models": None,
        "strategies": None,
        "require_secure_aggregation": False,
        "privacy_modes": None,
        "max_epsilon": None,
        "min_noise": None,
        "max_clip": None,
    }


def test_lists_of_the_policy_in_both_forms(tmp_path: Path) -> None:
    written = from_toml(
        tmp_path, 'policy.metrics = ["liver", "cases"]\npolicy.queries = ["hello"]\n'
    )
    given = load_site_config({"policy.metrics": "liver, cases", "policy.queries": "hello"})
    assert written.policy == given.policy
    assert given.policy.metrics == ("liver", "cases")


def test_ledger_lies_in_the_cache_unless_named(tmp_path: Path, home: Path) -> None:
    assert load_site_config({}).ledger_file == home / "cache" / "ledger.jsonl"
    assert load_site_config({"cache-dir": "/x"}).ledger_file == Path("/x/ledger.jsonl")
    assert load_site_config({"ledger": "/y/z"}).ledger_file == Path("/y/z")


@pytest.mark.parametrize("text", ['"liver, tumor"', '["liver", "tumor"]', '"liver,tumor"'])
def test_labels_as_text_or_as_a_list(tmp_path: Path, text: str) -> None:
    assert from_toml(tmp_path, f"labels = {text}").labels == ("liver", "tumor")


def test_label_map_by_name(tmp_path: Path) -> None:
    for text in ('"Liver:liver, Cancer : Tumour,9:background"', "{liver = 1, cancer = 2, 9 = 0}"):
        config = from_toml(tmp_path, f"label-map = {text}")
        assert config.label_map == {"liver": 1, "cancer": 2, 9: 0}


@pytest.mark.parametrize("text", ['"6:1, 7:2"', '{"6" = 1, "7" = 2}', '{6 = "1", 7 = "2"}'])
def test_label_map_as_text_or_as_a_table(tmp_path: Path, text: str) -> None:
    assert from_toml(tmp_path, f"label-map = {text}").label_map == {6: 1, 7: 2}


def test_order_of_precedence(tmp_path: Path) -> None:
    text = 'name = "from-file"\nmodality = "mr"\n[policy]\nmin-cases = 3\nmax-bytes = 9\n'
    config = from_toml(tmp_path, text, {"name": "from-node", "policy.min-cases": 5})
    assert (config.name, config.modality, config.device) == ("from-node", "mr", "auto")
    assert (config.policy.min_cases, config.policy.max_bytes) == (5, 9)
    named = tmp_path / "named.toml"
    named.write_text('device = "cpu"\n')
    config = from_toml(tmp_path, text, {"site-config": str(named)})
    assert (config.name, config.device) == (None, "cpu")


def test_flowers_own_keys_are_no_site_config() -> None:
    config = load_site_config({"partition-id": 0, "num-partitions": 3, "name": "aachen"})
    assert config == SiteConfig(name="aachen")


def test_a_given_folder_is_the_data_dir(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "aachen"\ndata-dir = "/elsewhere"\n')
    config = load_site_config({}, folder=tmp_path)
    assert (config.name, config.data_dir) == ("aachen", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("naem = 'x'", "naem: unknown key of the site config, did you mean 'name'?"),
        ("data_dir = 'x'", "did you mean 'data-dir'?"),
        ("quark = 1", "quark: unknown key of the site config; expected cache-dir, "),
        ("[policy]\nmin-case = 1", "policy.min-case: unknown key.*'policy.min-cases'"),
        ("policy = 3", "policy: got 3; expected"),
        ("name = 'Ä'", "name: got 'Ä'; expected a name of a-z, 0-9 and -"),
        ("name = 'x234567890123456789012345678901-3'", "32 characters at most"),
        ("device = 'gpu'", "device: got 'gpu'; expected auto, cpu, cuda, cuda:N or mps"),
        ("labels = 'tumor'", 'labels: got .*; expected "liver" or "liver,tumor"'),
        ("labels = 'liver,spleen'", "labels.*'spleen'"),
        ("labels = 3", "labels: got 3; expected a tuple"),
        ("modality = 'pet'", "modality: got 'pet'; expected 'auto', 'ct' or 'mr'"),
        ("threads = 0", "threads: got 0; expected at least 1"),
        ("threads = '4'", "threads: got '4'; expected a"),
        ("label-map = '3:7'", 'label-map: .*pairs of mask value and label 0, 1 or 2, as "3:1,4:2"'),
        ("label-map = '3'", "label-map: .*pairs of mask value"),
        ("label-map = ':1'", "label-map: .*pairs of mask value"),
        ("label-map = {3 = [1]}", "label-map: .*pairs of mask value"),
        ("label-map = 3", "label-map: got 3; expected a"),
        ("policy.allow-custom-code = 'yes'", "policy.allow-custom-code: got 'yes'; expected a"),
        ("policy.queries = ['helo']", r"policy.queries.0: got 'helo'; expected 'hello'"),
        ("policy.privacy-modes = 'dp'", r"policy.privacy-modes.0: got 'dp'; expected 'none'"),
        ("policy.max-epsilon = 0", "policy.max-epsilon: got 0; expected greater than 0"),
        ("policy.max-bytes = 0", "policy.max-bytes: got 0; expected at least 1"),
        ("name = ", "site.toml: not valid TOML"),
        ("name = " + "[" * 5000, "site.toml: not valid TOML"),
        ("cache-dir = '~nobody-9/c'", "cache-dir: got '~nobody-9/c', no such user here"),
        ("ledger = '~nobody-9/l'", "ledger: got '~nobody-9/l', no such user here"),
        ("signing-key = '~nobody-9/k'", "signing-key: got '~nobody-9/k', no such user here"),
    ],
)
def test_errors_name_key_got_and_expected(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error.replace("?", r"\?")) as caught:
        from_toml(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no.toml: can't be read .*; check site-config"):
        load_site_config({"site-config": str(tmp_path / "no.toml")})
    (tmp_path / "site.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_site_config({}, folder=tmp_path)


@pytest.mark.parametrize("key", ["data-dir", "site-config"])
def test_home_of_nobody(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got '~nobody-9/x', no such user here; give"):
        load_site_config({key: "~nobody-9/x"})


def test_path_with_a_null() -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_site_config({"site-config": "a\0b"})


def test_a_policy_key_of_the_node_needs_a_table_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy: got 3; expected a table \[policy\]"):
        from_toml(tmp_path, "policy = 3", {"policy.min-cases": 2})


def test_empty_text_means_unset(tmp_path: Path) -> None:
    config = from_toml(tmp_path, 'name = ""\ncache-dir = ""\nlabel-map = ""\nthreads = ""\n')
    assert (config.name, config.cache_dir, config.label_map, config.threads) == (None,) * 4


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSEG_HOME", str(tmp_path))
    assert fedseg_home() == tmp_path
    assert SiteConfig().cache == tmp_path / "cache"
    monkeypatch.setenv("FEDSEG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fedseg_home() == tmp_path / ".fedseg"


def test_names_and_devices() -> None:
    assert all(map(valid_site_name, ("a", "site-0", "x" * 32)))
    assert not any(map(valid_site_name, ("", "A", "a b", "x" * 33, "a\n", "ä", "a/b")))
    assert all(map(valid_device, ("auto", "cpu", "cuda", "cuda:0", "mps")))
    assert not any(map(valid_device, ("", "gpu", "cuda:", "cuda:x", "cpu\n")))
