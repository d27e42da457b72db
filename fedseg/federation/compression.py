"""Compress a flat update before it leaves a site, and read any part of it at the server.

What a scheme sends has lengths that follow from the number of values alone, so the receiver checks
them before it decodes and never allocates more than the model.

Bytes against float32: `fp16` 0.5, `int8` 0.252, `int4` 0.133, `top-k` of a tenth of the values
0.057. What a scheme loses the site keeps and adds to its next update, see `feedback`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedseg.federation.codecs import (
    Parts,
    Sizes,
    bitmap_index,
    byte_sizes,
    check_bitmap,
    decode_bytes,
    decode_half,
    decode_largest,
    decode_nibbles,
    encode_bytes,
    encode_half,
    encode_largest,
    encode_nibbles,
    half_sizes,
    largest_sizes,
    nibble_sizes,
)
from fedseg.sections import FederationConfig

__all__ = [
    "SCHEMES",
    "Scheme",
    "check_parts",
    "decode",
    "encode",
    "finite_and_norm",
    "indexed",
    "make_scheme",
    "scheme_of",
]

_LARGEST = 2.0**120
"""No update is larger; whatever is sent within it decodes without overflow."""

_CHUNK = 2**20

_NPY_HEADER = 128
"""Bytes that an array on the wire takes besides its values."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a flat vector is packed.

    Attributes:
        name: Its name in `federation.compression`.
        encode: Vector float32 `[N]` to named arrays.
        decode: Arrays and `start, stop` to values float32 `[stop - start]`.
        sizes: N to type and length of each array.
        top_k: Share of the values that is sent.
    """

    name: str
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    decode: Callable[[Parts, int, int], torch.Tensor]
    sizes: Callable[[int], Sizes]
    top_k: float = 1.0

    def bytes(self, size: int) -> int:
        """Bytes that a vector of `size` values takes on the wire."""
        return sum(
            _NPY_HEADER + dtype.itemsize * length for dtype, length in self.sizes(size).values()
        )


def _none(_: float) -> Scheme:
    return Scheme(
        name="none",
        encode=lambda vector: {"values": vector},
        decode=lambda parts, start, stop: parts["values"][start:stop],
        sizes=lambda size: {"values": (torch.float32, size)},
    )


def _fp16(_: float) -> Scheme:
    return Scheme(name="fp16", encode=encode_half, decode=decode_half, sizes=half_sizes)


def _int8(_: float) -> Scheme:
    return Scheme(name="int8", encode=encode_bytes, decode=decode_bytes, sizes=byte_sizes)


def _int4(_: float) -> Scheme:
    return Scheme(name="int4", encode=encode_nibbles, decode=decode_nibbles, sizes=nibble_sizes)


def _top_k(share: float) -> Scheme:
    return Scheme(
        name="top-k",
        encode=functools.partial(encode_largest, share=share),
        decode=decode_largest,
        sizes=functools.partial(largest_sizes, share=share),
        top_k=share,
    )


SCHEMES: dict[str, Callable[[float], Scheme]] = {
    "none": _none,
    "fp16": _fp16,
    "int8": _int8,
    "int4": _int4,
    "top-k": _top_k,
}


def make_scheme(name: str, *, top_k: float = 0.1) -> Scheme:
    """Make a scheme.

    Args:
        name: A key of `SCHEMES`.
        top_k: Share of the values that `top-k` sends; the others send all.
    """
    return SCHEMES[name](top_k)


def scheme_of(config: FederationConfig) -> Scheme:
    """Make the scheme that the study names; the same at the site and at the server."""
    return make_scheme(config.compression, top_k=config.top_k)


def encode(vector: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Pack a flat vector float32 `[N]`, N at least 1.

    Raises:
        ValueError: A value isn't finite, or larger than 2^120.
    """
    if not bool(torch.linalg.vector_norm(vector, math.inf) <= _LARGEST):
        raise ValueError("update: got values that aren't finite or beyond 2^120")
    return scheme.encode(vector)


def decode(parts: Parts, scheme: Scheme, start: int, stop: int) -> torch.Tensor:
    """Unpack values `[start, stop)` as float32; not to be written to.

    Args:
        parts: Arrays that `check_parts` let pass, whole or on disk.
        scheme: How they are packed.
        start: First value.
        stop: Last value + 1.
    """
    return scheme.decode(parts, start, stop)


def indexed(parts: Parts, scheme: Scheme, *, size: int) -> Parts:
    """Add what makes `decode` quick in the middle of `top-k`; it gives the same without."""
    if scheme.name != "top-k":
        return parts
    return {**parts, "before": bitmap_index(parts["bitmap"][0:size])}


def check_parts(parts: Mapping[str, torch.Tensor], scheme: Scheme, *, size: int) -> None:
    """Check arrays from the other side before anything is decoded.

    Afterwards any range can be decoded; whether all values are finite is `finite_and_norm`'s.

    Raises:
        ValueError: Names, types, lengths, steps or the bitmap aren't those of a vector of `size`
            values.
    """
    found = {name: (part.dtype, part.numel()) for name, part in parts.items() if part.dim() == 1}
    if found != scheme.sizes(size) or len(found) != len(parts):
        raise ValueError("other arrays than the scheme's")
    for name in sorted({"unit", "scales"} & set(parts)):
        steps = parts[name].float()
        if not bool(((steps >= 0) & (steps <= _LARGEST)).all()):
            raise ValueError("steps that aren't finite, or are negative or too large")
    if "bitmap" in parts:
        check_bitmap(parts["bitmap"], size=size, count=len(parts["values"]))


def finite_and_norm(parts: Parts, scheme: Scheme, *, size: int) -> tuple[bool, float]:
    """Decode chunk by chunk; return whether all values are finite, and their L2 norm.

    The norm is summed in float64, where no square of a float32 overflows: it is finite just if all
    values are.
    """
    total, found = 0.0, indexed(parts, scheme, size=size)
    for start in range(0, size, _CHUNK):
        chunk = decode(found, scheme, start, min(start + _CHUNK, size)).double()
        total += float(chunk.dot(chunk))
    return math.isfinite(total), math.sqrt(total)
