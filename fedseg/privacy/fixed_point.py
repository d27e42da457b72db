"""Fixed point for sums modulo 2^32: a range that n sites can't overflow, and numbers in limbs.

Values. A site's value x, clipped to [-c, c], counts with its weight w <= W as the integer

    q = round(S w x / (c W)),  S = floor((2^31 - 1) / n)

so |q| <= S, and for any n sites or fewer |sum q| <= n S <= 2^31 - 1: in two's complement the sum
modulo 2^32 is the sum. It never wraps, whatever the sites' values are.

Rounding is stochastic: up with the probability of the fraction, so q has the mean S w x / (c W)
exactly and a variance of 1/4 at most. The weighted mean is sum q * c W / (S sum w), its error is
unbiased, and its standard deviation is at most sqrt(n) / 2 * c W / (S sum w).

Numbers (weight, cases, loss) need more range and precision than a word. Each is the integer
v = round(2^32 x) + 2^(4b - 1), cut into four limbs of b = 32 - bitlength(n) bits. As n (2^b - 1) <
2^32, no sum of limbs wraps either. What doesn't fit is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedseg.errors import ProtocolError
from fedseg.privacy.graph import MOST_SITES
from fedseg.privacy.secagg_masks import Words

__all__ = [
    "LIMBS",
    "Encoding",
    "decode_numbers",
    "decode_values",
    "effective_weight",
    "encode_numbers",
    "encode_values",
]

LIMBS = 4
_FRACTION = 32
_CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What sites and server must agree on before they encode.

    Attributes:
        sites: Most sites that a sum may have.
        clip: Values are clipped to [-clip, clip].
        max_weight: Largest weight.
    """

    sites: int
    clip: float
    max_weight: float

    def __post_init__(self) -> None:
        """Refuse what the bounds of the sums don't hold for."""
        if not 1 <= self.sites <= MOST_SITES:
            raise ProtocolError(f"sites: got {self.sites}; expected 1 to {MOST_SITES}")
        if not (0 < self.clip < math.inf and 0 < self.max_weight < math.inf):
            raise ProtocolError(
                f"got clip {self.clip} and largest weight {self.max_weight}; expected above 0"
            )

    @property
    def scale(self) -> int:
        """S: the integer that the largest value of the heaviest site becomes."""
        return (2**31 - 1) // self.sites

    @property
    def bits(self) -> int:
        """Bits of a limb."""
        return 32 - self.sites.bit_length()


def effective_weight(weight: float, encoding: Encoding) -> float:
    """Round a weight to what its limbs hold: values and sum of weights then use the very same.

    Raises:
        ProtocolError: It is below 0 or above the largest.
    """
    if not 0 <= weight <= encoding.max_weight:
        raise ProtocolError(
            f"weight: got {weight:g}; expected 0 to {encoding.max_weight:g}; "
            "raise privacy.secagg-max-weight"
        )
    return round(weight * 2.0**_FRACTION) / 2.0**_FRACTION


def encode_values(
    values: np.ndarray,
    weight: float,
    encoding: Encoding,
    *,
    rng: np.random.Generator,
    out: Words,
) -> int:
    """Weigh, clip and round values to words.

    Args:
        values: float32 `[N]`, finite.
        weight: The effective weight.
        encoding: What was agreed.
        rng: Draws the rounding; it needs no secrecy.
        out: uint32 `[N]`, filled.

    Returns:
        Number of values that were clipped.

    Raises:
        ProtocolError: A value isn't finite.
    """
    scale, clip = encoding.scale, encoding.clip
    factor = scale * (weight / (clip * encoding.max_weight))
    clipped = 0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64)
        if not np.isfinite(part).all():
            raise ProtocolError("values: got NaN or Inf; expected finite values")
        clipped += int(np.count_nonzero(np.abs(part) > clip))
        np.clip(part, -clip, clip, out=part)
        part *= factor
        part += rng.random(len(part), dtype=np.float32)
        np.floor(part, out=part)
        # The bound holds by this line, not by how the products above were rounded.
        np.clip(part, -scale, scale, out=part)
        out[start : start + _CHUNK] = part.astype(np.int32).view(np.uint32)
    return clipped


def decode_values(words: Words, total_weight: float, encoding: Encoding) -> np.ndarray:
    """Turn summed words `[N]` into the weighted mean, float32 `[N]`.

    Raises:
        ProtocolError: The sum of the weights is 0, or weights or values are larger than sites that
            keep to the terms can have sent.
    """
    if not 0 < total_weight <= encoding.sites * encoding.max_weight:
        raise ProtocolError(f"weights: got a sum of {total_weight:g}; expected one above 0")
    factor = encoding.clip * encoding.max_weight / (encoding.scale * total_weight)
    most = (1 + 1e-6) * encoding.clip + encoding.sites * factor  # each was rounded by 1 at most
    mean = np.empty(len(words), np.float32)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].view(np.int32) * factor
        if np.abs(part).max() > most:
            raise ProtocolError("sum: got values larger than the clip; a site sent other words")
        mean[start : start + _CHUNK] = part
    return mean


def encode_numbers(numbers: Sequence[float], encoding: Encoding) -> Words:
    """Cut numbers into limbs, lowest first: uint32 `[4 len(numbers)]`.

    Raises:
        ProtocolError: One isn't finite or too large.
    """
    bits = encoding.bits
    words = []
    for number in numbers:
        if not abs(number) < 2.0 ** (LIMBS * bits - 2 - _FRACTION):
            raise ProtocolError(
                f"a number to sum: got {number:g}; expected below "
                f"{2.0 ** (LIMBS * bits - 2 - _FRACTION):g}"
            )
        whole = round(number * 2**_FRACTION) + _offset(bits)
        words += [whole >> (bits * limb) & (2**bits - 1) for limb in range(LIMBS)]
    return np.array(words, np.uint32)


def decode_numbers(
    words: Words, keys: Sequence[str], encoding: Encoding, *, summands: int
) -> Mapping[str, float]:
    """Put the sums of `summands` sites' limbs together.

    Raises:
        ProtocolError: A sum is larger than so many sites can have sent.
    """
    bits = encoding.bits
    limbs = [int(word) for word in words]
    if len(limbs) != LIMBS * len(keys) or max(limbs, default=0) > summands * (2**bits - 1):
        raise ProtocolError("sums: a limb is larger than these sites can have sent")
    found = {}
    for index, key in enumerate(keys):
        parts = limbs[LIMBS * index : LIMBS * (index + 1)]
        whole = sum(part << (bits * limb) for limb, part in enumerate(parts))
        found[key] = (whole - summands * _offset(bits)) / 2**_FRACTION
    return found


def _offset(bits: int) -> int:
    """Makes a number of either sign a positive integer."""
    return 1 << (LIMBS * bits - 1)
