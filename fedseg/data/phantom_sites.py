"""Folders of phantoms: of `fedseg phantom`, and those of simulated sites, kept in the cache."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.phantom import KINDS, PhantomKind, write_phantom_site
from fedseg.errors import ConfigError, DataError
from fedseg.site_config import fedseg_home

__all__ = ["check_free", "phantom_folder", "phantom_kinds"]


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


def check_free(folder: Path, note: str) -> None:
    """Refuse to write phantoms among other cases: those with names that are taken would be kept.

    Args:
        folder: The site's folder, or where it will be.
        note: What its site.toml begins with, see `write_phantom_site`, where it has these phantoms.

    Raises:
        DataError: It has other cases.
        OSError: It can't be read.
    """
    first = ""
    if (folder / "site.toml").exists():
        with (folder / "site.toml").open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip("# \n")
    parts = [folder / name for name in ("site.toml", "images", "masks")]
    taken = any(part.is_file() or (part.is_dir() and any(part.iterdir())) for part in parts)
    if taken and first != note:
        has = first if first.startswith("phantoms of ") else "other cases"
        raise DataError(f"{folder}: has {has}, expected {note}; give another folder, or remove it")
