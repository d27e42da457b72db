"""The one extension point: a name in a table, or `pkg.mod:function` from outside."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedseg.errors import ConfigError

__all__ = ["did_you_mean", "is_custom", "resolve"]

_CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_custom(name: str) -> bool:
    """Tell whether a name has the form `pkg.mod:function`."""
    return _CUSTOM.fullmatch(name) is not None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""


def resolve(key: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Look a function up by name, or import it where the name is `pkg.mod:function`.

    Args:
        key: The config key the name came from, for the error.
        name: A name in the table, or `pkg.mod:function`.
        table: The built-in functions.

    Raises:
        ConfigError: The name is in no table, or the module has no such function.
        ModuleNotFoundError: The package isn't installed here.
    """
    if name in table:
        return table[name]
    if not is_custom(name):
        raise ConfigError(
            f"{key}: got '{name}'{did_you_mean(name, table)}; expected one of "
            f"{', '.join(table)}, or your own as pkg.mod:function"
        )
    module_name, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module_name), attribute, None)
    if not callable(function):
        raise ConfigError(
            f"{key}: got '{name}'; module {module_name} has no function {attribute}; "
            "correct the name"
        )
    return function  # type: ignore[no-any-return]
