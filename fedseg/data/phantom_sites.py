"""Phantoms that simulated sites and the server hold: written once, kept in the cache."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.phantom import KINDS, PhantomKind, write_phantom_site
from fedseg.errors import ConfigError
from fedseg.site_config import fedseg_home

__all__ = ["phantom_folder", "phantom_kinds"]


def phantom_folder(name: str, wanted: Sequence[tuple[PhantomKind, Sequence[int]]]) -> Path:
    """Write phantoms into the cache unless they are there, and return their folder."""
    content = hashlib.sha256(repr([(kind, list(seeds)) for kind, seeds in wanted]).encode())
    folder = fedseg_home() / "cache" / "phantoms" / f"{name}-{content.hexdigest()[:12]}"
    for kind, seeds in wanted:
        write_phantom_site(folder, kind, seeds, name=name)
    return folder


def phantom_kinds(study: StudyConfig) -> list[PhantomKind]:
    """Kinds named by `data.phantom-kinds`.

    Raises:
        ConfigError: A kind has no such name.
    """
    names = [name.strip() for name in study.data.phantom_kinds.split(",")]
    for name in names:
        if name not in KINDS:
            raise ConfigError(
                f"data.phantom-kinds: got '{name}'; expected some of {', '.join(KINDS)}"
            )
    return [KINDS[name] for name in names]
