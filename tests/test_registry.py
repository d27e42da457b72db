"""Tests of the extension point."""

from pathlib import Path

import pytest

from fedseg.errors import ConfigError
from fedseg.registry import did_you_mean, is_custom, resolve

TABLE = {"one": abs, "two": len}


def test_names_of_the_table_and_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "outside_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mod.py").write_text("def double(x):\n    return 2 * x\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("key", "one", TABLE) is abs
    assert resolve("key", "outside_pkg.mod:double", TABLE)(4) == 8
    for name in ("number", "nothing"):
        with pytest.raises(ConfigError) as caught:
            resolve("key", f"outside_pkg.mod:{name}", TABLE)
        assert str(caught.value) == (
            f"key: got 'outside_pkg.mod:{name}'; module outside_pkg.mod has no function {name}; "
            "correct the name"
        )
    with pytest.raises(ModuleNotFoundError):
        resolve("key", "no_such_package_here:double", TABLE)


@pytest.mark.parametrize("name", ["onne", "", "a:b:c", "a b:c", "a:1", ":x", "x:"])
def test_anything_else_is_refused_and_nothing_is_imported(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of one, two, or your own"):
        resolve("key", name, TABLE)


def test_form() -> None:
    assert is_custom("pkg.mod:function")
    assert is_custom("mod:function_2")
    assert not any(map(is_custom, ("unet", "unet++", "pkg.mod", "pkg:mod:f", "pkg:f()", "pkg:f\n")))


def test_near_misses() -> None:
    assert did_you_mean("unett", ["unet", "vnet"]) == ", did you mean 'unet'?"
    assert did_you_mean("xyz", ["unet", "vnet"]) == ""
