"""Tests of updates that wait on disk."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedseg.errors import StudyError
from fedseg.federation.compression import SCHEMES, decode, encode, make_scheme
from fedseg.federation.spool import check_room, open_update, spool

SIZE = 20_001


def update(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
def test_any_range_is_that_of_what_was_spooled(name: str, tmp_path: Path) -> None:
    scheme = make_scheme(name, top_k=0.07)
    parts = encode(update(), scheme)
    path = spool(tmp_path / "spool" / "3", "aachen", parts, scheme=scheme)
    assert path == tmp_path / "spool" / "3" / "aachen.safetensors"
    opened = open_update(path, size=SIZE)
    assert (opened.site, opened.size) == ("aachen", SIZE)
    assert (opened.scheme.name, opened.scheme.top_k) == (name, scheme.top_k)
    ends = np.random.default_rng(0).integers(SIZE + 1, size=(40, 2))
    for start, stop in [(0, SIZE), (0, 0), (SIZE, SIZE), *np.sort(ends, 1).tolist()]:
        assert torch.equal(opened.chunk(start, stop), decode(parts, scheme, start, stop))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_spooled_file_is_an_ordinary_safetensors_file(name: str, tmp_path: Path) -> None:
    scheme = make_scheme(name)
    parts = encode(update(), scheme)
    found = load_file(spool(tmp_path, "aachen", parts, scheme=scheme))
    assert found.keys() == parts.keys()
    assert all(torch.equal(found[key], parts[key]) for key in parts)


def test_reading_maps_no_file_into_memory(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    scheme = make_scheme("none")
    opened = open_update(
        spool(tmp_path, "aachen", encode(update(), scheme), scheme=scheme), size=SIZE
    )
    chunk = opened.chunk(0, SIZE)
    assert torch.equal(chunk, update())
    assert "aachen" not in maps.read_text()


def test_a_chunk_that_is_written_to_does_not_change_the_file(tmp_path: Path) -> None:
    scheme = make_scheme("none")
    opened = open_update(
        spool(tmp_path, "aachen", encode(update(), scheme), scheme=scheme), size=SIZE
    )
    opened.chunk(0, SIZE).zero_()
    assert torch.equal(opened.chunk(0, SIZE), update())


def test_spooling_again_replaces(tmp_path: Path) -> None:
    scheme = make_scheme("int8")
    for seed in (0, 1):
        path = spool(tmp_path, "aachen", encode(update(seed), scheme), scheme=scheme)
    expected = decode(encode(update(1), scheme), scheme, 0, SIZE)
    assert torch.equal(open_update(path, size=SIZE).chunk(0, SIZE), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["aachen.safetensors"]


@pytest.fixture
def _small_files() -> Iterator[None]:
    """Writing more than 40 kB to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_small_files")
def test_full_disk_is_one_clear_error_and_leaves_the_others_whole(tmp_path: Path) -> None:
    small, large = make_scheme("int8"), make_scheme("none")
    first = spool(tmp_path, "aachen", encode(update(), small), scheme=small)
    with pytest.raises(StudyError, match=r"can't be written .* free space, then go on with"):
        spool(tmp_path, "berlin", encode(update(), large), scheme=large)
    assert [file.name for file in tmp_path.iterdir()] == ["aachen.safetensors"]
    open_update(first, size=SIZE)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_damaged_file_is_found_when_it_is_opened(name: str, tmp_path: Path) -> None:
    scheme = make_scheme(name)
    whole = spool(tmp_path, "aachen", encode(update(), scheme), scheme=scheme).read_bytes()
    damaged = tmp_path / "berlin.safetensors"
    headers = [b"", b"\xff" * 64, whole[:8] + b"[]" + whole[10:], (2).to_bytes(8, "little") + b"{}"]
    shorter = [whole[:length] for length in (5, 8, 100, len(whole) // 2, len(whole) - 1)]
    for content in (*headers, *shorter, whole + b"x", whole.replace(b'"scheme"', b'"sch\xffme"')):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="berlin"):
            open_update(damaged, size=SIZE)
    for size in (SIZE - 1, SIZE + 4096):
        damaged.write_bytes(whole)
        with pytest.raises(ValueError, match=f"of {size} values"):
            open_update(damaged, size=size)


def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path: Path) -> None:
    scheme = make_scheme("none")
    path = spool(tmp_path, "aachen", encode(update(), scheme), scheme=scheme)
    opened = open_update(path, size=SIZE)
    path.write_bytes(path.read_bytes()[:-8])
    opened.chunk(0, 100)
    with pytest.raises(ValueError, match="shorter"):
        opened.chunk(SIZE - 100, SIZE)


def test_room_is_checked_before_a_round(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    check_room(folder, needed=1)
    assert folder.is_dir()
    with pytest.raises(StudyError, match="MB free; a round needs"):
        check_room(folder, needed=10 * shutil.disk_usage(tmp_path).total)
