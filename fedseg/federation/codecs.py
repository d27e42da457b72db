"""How values become fewer bytes, and back: half precision, blocks that share a step, a bitmap.

Every encoder is deterministic, and any range decodes to the same bits as it does within the whole.
Steps and half-precision values are relative to `unit`, a power of two by which the largest just
fits: nothing overflows, and the small updates of a late round lose nothing.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

__all__ = [
    "Parts",
    "Sizes",
    "Sliceable",
    "bitmap_index",
    "byte_sizes",
    "check_bitmap",
    "decode_bytes",
    "decode_half",
    "decode_largest",
    "decode_nibbles",
    "encode_bytes",
    "encode_half",
    "encode_largest",
    "encode_nibbles",
    "half_sizes",
    "largest_sizes",
    "nibble_sizes",
]

_BLOCK_8, _LEVELS_8 = 256, 127
_BLOCK_4, _LEVELS_4 = 64, 7
"""Values that share a step, and the largest multiple of it."""

_HALF_BITS = 15
"""The largest value or step becomes 2^14 to 2^15 in half precision, whose largest is 65504."""

_STRIDE = 512
"""Bytes of the bitmap between two entries of its index: 4096 values."""

_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


class Sliceable(Protocol):
    """Values of which `[start:stop]` can be read: a tensor `[N]`, or an array in a file."""

    def __getitem__(self, span: slice, /) -> torch.Tensor:
        """Read a range; what lies beyond the end is left out, as in a tensor."""


Parts = Mapping[str, Sliceable]
Sizes = dict[str, tuple[torch.dtype, int]]


def half_sizes(size: int) -> Sizes:
    """Types and lengths of what `encode_half` makes of so many values."""
    return {"values": (torch.float16, size), "unit": (torch.float32, 1)}


def encode_half(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round to half precision."""
    unit = _unit(float(torch.linalg.vector_norm(vector, math.inf)))
    return {"values": (vector / unit).half(), "unit": torch.tensor([unit])}


def decode_half(parts: Parts, start: int, stop: int) -> torch.Tensor:
    """Unpack a range."""
    return parts["values"][start:stop].float().mul_(parts["unit"][0:1])


def byte_sizes(size: int) -> Sizes:
    """Types and lengths of what `encode_bytes` makes of so many values."""
    return {"values": (torch.int8, size), **_step_sizes(size, _BLOCK_8)}


def encode_bytes(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round to multiples of a step, which 256 values share."""
    blocks, steps = _encode_blocks(vector, block=_BLOCK_8, levels=_LEVELS_8)
    return {"values": blocks.to(torch.int8).view(-1)[: vector.numel()].clone(), **steps}


def decode_bytes(parts: Parts, start: int, stop: int) -> torch.Tensor:
    """Unpack a range."""
    first, last = start // _BLOCK_8, _ceil(stop, _BLOCK_8)
    codes = parts["values"][first * _BLOCK_8 : last * _BLOCK_8].float()
    offset = first * _BLOCK_8
    return _decode_blocks(codes, parts, first, _BLOCK_8)[start - offset : stop - offset]


def nibble_sizes(size: int) -> Sizes:
    """Types and lengths of what `encode_nibbles` makes of so many values."""
    return {"values": (torch.uint8, _ceil(size, 2)), **_step_sizes(size, _BLOCK_4)}


def encode_nibbles(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round to multiples of a step, which 64 values share; two a byte, the first in the low."""
    blocks, steps = _encode_blocks(vector, block=_BLOCK_4, levels=_LEVELS_4)
    pairs = blocks.add_(8).to(torch.uint8).view(-1, 2)
    packed = pairs[:, 0] | (pairs[:, 1] << 4)
    return {"values": packed[: _ceil(vector.numel(), 2)].clone(), **steps}


def decode_nibbles(parts: Parts, start: int, stop: int) -> torch.Tensor:
    """Unpack a range."""
    first, last = start // _BLOCK_4, _ceil(stop, _BLOCK_4)
    packed = parts["values"][first * _BLOCK_4 // 2 : last * _BLOCK_4 // 2]
    codes = torch.stack((packed & 15, packed >> 4), 1).view(-1).float().sub_(8)
    offset = first * _BLOCK_4
    return _decode_blocks(codes, parts, first, _BLOCK_4)[start - offset : stop - offset]


def largest_sizes(size: int, *, share: float) -> Sizes:
    """Types and lengths of what `encode_largest` makes of so many values."""
    return {"bitmap": (torch.uint8, _ceil(size, 8)), **byte_sizes(_count(size, share))}


def encode_largest(vector: torch.Tensor, *, share: float) -> dict[str, torch.Tensor]:
    """Send exactly the k largest magnitudes, k = ceil(share * N); of equal ones the first.

    What isn't sent must be remembered (`feedback`): Stich et al., Sparsified SGD with Memory,
    NeurIPS 2018.
    """
    size = vector.numel()
    count = _count(size, share)
    magnitude = vector.abs().numpy()
    least = np.partition(magnitude, size - count)[size - count]
    chosen = magnitude > least
    chosen[np.flatnonzero(magnitude == least)[: count - np.count_nonzero(chosen)]] = True
    bitmap = np.packbits(chosen, bitorder="little")
    values = vector[torch.from_numpy(chosen)]
    return {"bitmap": torch.from_numpy(bitmap), **encode_bytes(values)}


def decode_largest(parts: Parts, start: int, stop: int) -> torch.Tensor:
    """Unpack a range; quick in the middle where `parts["before"]` is the bitmap's index."""
    byte = start // 8
    bits = np.unpackbits(parts["bitmap"][byte : _ceil(stop, 8)].numpy(), bitorder="little")
    offset = start - 8 * byte
    first = _ones_before(parts, byte) + int(np.count_nonzero(bits[:offset]))
    chosen = torch.from_numpy(bits[offset : offset + stop - start]).view(torch.bool)
    count = int(np.count_nonzero(bits[offset : offset + stop - start]))
    sent = decode_bytes(parts, first, first + count)
    return torch.zeros(stop - start).masked_scatter_(chosen, sent)


def bitmap_index(bitmap: torch.Tensor) -> torch.Tensor:
    """Count the ones before each 4096th value: int64 `[ceil(N / 4096)]`."""
    ones = _ONES[bitmap.numpy()]
    blocks = np.add.reduceat(ones, np.arange(0, len(ones), _STRIDE), dtype=np.int64)
    return torch.from_numpy(np.cumsum(blocks) - blocks)


def check_bitmap(bitmap: torch.Tensor, *, size: int, count: int) -> None:
    """Check that just `count` of `size` values are marked, and none beyond.

    Raises:
        ValueError: They aren't.
    """
    spare = np.unpackbits(bitmap[-1:].numpy(), bitorder="little")[(size - 1) % 8 + 1 :]
    if _popcount(bitmap) != count or spare.any():
        raise ValueError("a bitmap that marks another number of values")


def _ones_before(parts: Parts, byte: int) -> int:
    """Ones of the bitmap before a byte."""
    start = ones = 0
    if "before" in parts and byte:
        entry = (byte - 1) // _STRIDE
        start, ones = entry * _STRIDE, int(parts["before"][entry : entry + 1])
    return ones + _popcount(parts["bitmap"][start:byte])


def _popcount(bitmap: torch.Tensor) -> int:
    return int(_ONES[bitmap.numpy()].sum(dtype=np.int64))


def _encode_blocks(
    vector: torch.Tensor, *, block: int, levels: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Round to multiples of each block's step: float32 `[blocks, block]`, padded with 0.

    Values are divided by the step as it is sent, so its own rounding adds no error but where it
    cuts the block's largest.
    """
    size = vector.numel()
    blocks = torch.zeros(_ceil(size, block), block)
    blocks.view(-1)[:size] = vector
    low, high = blocks.aminmax(dim=1)
    wanted = torch.maximum(high, -low) / levels
    unit = _unit(float(wanted.max()))
    scales = (wanted / unit).half()
    steps = scales.float() * unit
    # Divided by infinity, a block of zeros stays one.
    blocks /= steps.masked_fill(steps == 0, math.inf)[:, None]
    blocks.round_().clamp_(-levels, levels)
    return blocks, {"scales": scales, "unit": torch.tensor([unit])}


def _decode_blocks(codes: torch.Tensor, parts: Parts, first: int, block: int) -> torch.Tensor:
    """Multiply float32 codes, which begin at block `first`, by the blocks' steps, in place."""
    steps = parts["scales"][first : first + _ceil(len(codes), block)].float()
    steps *= parts["unit"][0:1]
    whole = len(codes) // block
    codes[: whole * block].view(whole, block).mul_(steps[:whole, None])
    codes[whole * block :] *= steps[whole:]
    return codes


def _step_sizes(size: int, block: int) -> Sizes:
    return {"scales": (torch.float16, _ceil(size, block)), "unit": (torch.float32, 1)}


def _unit(largest: float) -> float:
    return math.ldexp(1.0, max(math.frexp(largest)[1] - _HALF_BITS, -126))


def _count(size: int, share: float) -> int:
    return min(size, math.ceil(share * size))


def _ceil(size: int, by: int) -> int:
    return -(-size // by)
