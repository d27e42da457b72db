"""Tests of compressed updates: oracles in numpy, ranges, bounds, hostile arrays."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedseg.arrays import array_bytes, arrays_to_state, state_to_arrays
from fedseg.federation.compression import (
    SCHEMES,
    Scheme,
    check_parts,
    decode,
    encode,
    finite_and_norm,
    indexed,
    make_scheme,
    scheme_of,
)
from fedseg.sections import FederationConfig

Tensors = dict[str, torch.Tensor]

NAMES = list(SCHEMES)
LOSSY = [name for name in NAMES if name != "none"]
MOST = 2.0**120
FLOATS = st.one_of(
    st.floats(-MOST, MOST, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, MOST, -MOST]),
)
VECTORS = hnp.arrays(np.float32, st.integers(1, 700), elements=FLOATS, fill=st.just(0.0))


def normal(size: int, *, seed: int = 0, scale: float = 1e-3) -> torch.Tensor:
    """An update as training makes them: layers of different scale."""
    rng = np.random.default_rng(seed)
    layers = np.repeat(10.0 ** rng.uniform(-2, 0, -(-size // 100)), 100)[:size]
    return torch.from_numpy((scale * layers * rng.normal(size=size)).astype(np.float32))


def steps(parts: Tensors, block: int, size: int) -> np.ndarray:
    """Each value's step, float32."""
    scales = parts["scales"].numpy().astype(np.float32) * parts["unit"].numpy()
    return np.repeat(scales, block)[:size]


def by_hand(parts: Tensors, name: str, size: int) -> np.ndarray:
    """Decode the whole in another way."""
    values = parts["values"].numpy()
    if name == "none":
        return values
    if name == "fp16":
        return values.astype(np.float32) * parts["unit"].numpy()
    if name == "int8":
        return values * steps(parts, 256, size)
    if name == "int4":
        halves = [half for byte in values.tolist() for half in (byte % 16 - 8, byte // 16 - 8)]
        return np.array(halves[:size], np.float32) * steps(parts, 64, size)
    bits = [int(byte) >> i & 1 for byte in parts["bitmap"].numpy() for i in range(8)]
    where = np.flatnonzero(bits)
    whole = np.zeros(size, np.float32)
    whole[where] = values * steps(parts, 256, len(values))
    return whole


@pytest.mark.parametrize("name", NAMES)
@given(vector=VECTORS, top_k=st.sampled_from([0.01, 0.1, 1.0]))
@settings(max_examples=60, deadline=None)
def test_decodes_as_by_hand_and_is_checked_and_finite(
    name: str, vector: np.ndarray, top_k: float
) -> None:
    scheme, size = make_scheme(name, top_k=top_k), len(vector)
    parts = encode(torch.from_numpy(vector), scheme)
    check_parts(parts, scheme, size=size)
    decoded = decode(parts, scheme, 0, size).numpy()
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, by_hand(parts, name, size))
    finite, norm = finite_and_norm(parts, scheme, size=size)
    assert finite
    assert norm == pytest.approx(np.linalg.norm(decoded.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
@given(vector=VECTORS)
@settings(max_examples=60, deadline=None)
def test_error_is_half_a_step_at_most(name: str, vector: np.ndarray) -> None:
    scheme, size = make_scheme(name), len(vector)
    decoded = decode(encode(torch.from_numpy(vector), scheme), scheme, 0, size).numpy()
    exact = vector.astype(np.float64)
    error = np.abs(decoded - exact)
    largest = np.abs(exact).max()
    if name == "fp16":
        allowed = np.abs(exact) * 2.0**-11 + largest * 2.0**-38
    else:
        block, levels = (256, 127) if name == "int8" else (64, 7)
        starts = np.arange(0, size, block)
        most = np.maximum.reduceat(np.abs(exact), starts)
        # The step's own rounding; what is 2^-32 of the largest value may vanish.
        allowed = np.repeat(most / (2 * levels) * (1 + 2**-10) + largest * 2.0**-32, block)[:size]
    assert (error <= allowed + 1e-38).all()


@pytest.mark.parametrize("top_k", [0.001, 0.1, 0.37, 1.0])
@given(
    vector=st.one_of(
        VECTORS, hnp.arrays(np.float32, st.integers(1, 300), elements=st.integers(-3, 3))
    )
)
@settings(max_examples=40, deadline=None)
def test_top_k_sends_the_k_largest_and_of_equal_ones_the_first(
    top_k: float, vector: np.ndarray
) -> None:
    size = len(vector)
    count = math.ceil(top_k * size)
    ordered = sorted(range(size), key=lambda i: (-abs(float(vector[i])), i))
    parts = encode(torch.from_numpy(vector), make_scheme("top-k", top_k=top_k))
    bits = np.unpackbits(parts["bitmap"].numpy(), bitorder="little")[:size]
    assert np.flatnonzero(bits).tolist() == sorted(ordered[:count])
    assert len(parts["values"]) == count


@pytest.mark.parametrize("name", NAMES)
@given(size=st.integers(1, 20_000), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=60, deadline=None)
def test_any_range_decodes_as_the_whole(name: str, size: int, ends: tuple[float, float]) -> None:
    scheme = make_scheme(name)
    parts = encode(normal(size), scheme)
    whole = decode(parts, scheme, 0, size)
    start, stop = sorted(round(end * size) for end in ends)
    for found in (parts, indexed(parts, scheme, size=size)):
        assert torch.equal(decode(found, scheme, start, stop), whole[start:stop])


def test_ends_of_an_update_that_ends_with_an_entry_of_the_index() -> None:
    scheme, size = make_scheme("top-k"), 8192
    parts = encode(normal(size), scheme)
    found = indexed(parts, scheme, size=size)
    for start, stop in ((size, size), (4096, size), (0, 0), (4096, 4096)):
        whole = decode(parts, scheme, 0, size)
        assert torch.equal(decode(found, scheme, start, stop), whole[start:stop])


@pytest.mark.parametrize(("name", "zero"), [("int8", 0), ("int4", 0x88)])
def test_blocks_of_zeros_stay_zeros(name: str, zero: int) -> None:
    vector, scheme = torch.zeros(1024), make_scheme(name)
    for value in (0.0, 1.0):
        vector[0] = value
        parts = encode(vector, scheme)
        assert (parts["values"][512:] == zero).all()
        decoded = decode(parts, scheme, 0, 1024)
        assert decoded[0] == pytest.approx(value, rel=1e-3)
        assert not decoded[1:].any()


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
def test_a_step_too_small_for_its_own_rounding_cuts_and_never_wraps(name: str, levels: int) -> None:
    """Steps of 1.4 units of the least half-precision number are sent as 1."""
    vector, scheme = torch.zeros(512), make_scheme(name)
    vector[0] = levels
    unit = 2.0**-14  # the largest step is 1, so it becomes 2^14
    vector[256] = levels * 1.4 * 2.0**-24 * unit
    decoded = decode(encode(vector, scheme), scheme, 0, 512)
    assert decoded[256] == levels * 2.0**-24 * unit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 4095, 4096, 100_001])
def test_over_the_wire_with_as_many_bytes_as_the_scheme_says(name: str, size: int) -> None:
    scheme = make_scheme(name)
    parts = encode(normal(size), scheme)
    record = state_to_arrays(parts)
    assert array_bytes(record) == scheme.bytes(size)
    like = {
        key: torch.empty(length, dtype=dtype, device="meta")
        for key, (dtype, length) in scheme.sizes(size).items()
    }
    arrived = arrays_to_state(record, like)
    assert all(torch.equal(arrived[key], parts[key]) for key in like)


def test_bytes_meet_the_targets() -> None:
    size = 4_800_000
    ratio = {name: make_scheme(name).bytes(size) / (4 * size) for name in NAMES}
    assert ratio["fp16"] < 0.501
    assert ratio["int8"] < 0.27
    assert ratio["int4"] < 0.15
    assert ratio["top-k"] < 0.06


@pytest.mark.parametrize(("name", "most"), [("fp16", 3e-4), ("int8", 0.01), ("int4", 0.12)])
def test_relative_error_of_an_update(name: str, most: float) -> None:
    vector, scheme = normal(200_000), make_scheme(name)
    error = decode(encode(vector, scheme), scheme, 0, len(vector)) - vector
    assert float(error.norm() / vector.norm()) < most


@pytest.mark.parametrize("name", LOSSY)
def test_scale_of_the_update_does_not_matter(name: str) -> None:
    """Late rounds have small updates; half precision alone would lose them."""
    vector, scheme = normal(5_000), make_scheme(name)
    whole = decode(encode(vector, scheme), scheme, 0, 5_000)
    for factor in (2.0**-60, 2.0**60):
        other = decode(encode(vector * factor, scheme), scheme, 0, 5_000)
        assert torch.equal(other, whole * factor)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_whatever_the_threads(name: str) -> None:
    vector, scheme = normal(300_000), make_scheme(name)
    one = encode(vector, scheme)
    torch.set_num_threads(2)
    two = encode(vector.clone(), scheme)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_leaves_the_update_as_it_was(name: str) -> None:
    vector = normal(1_000)
    encode(vector, make_scheme(name))
    assert torch.equal(vector, normal(1_000))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e37])
def test_a_site_does_not_pack_what_is_not_finite(name: str, value: float) -> None:
    vector = normal(1_000)
    vector[500] = value
    with pytest.raises(ValueError, match="finite"):
        encode(vector, make_scheme(name))


def test_scheme_of_a_study() -> None:
    config = FederationConfig.model_validate({"compression": "top-k", "top_k": 0.25})
    scheme = scheme_of(config)
    assert (scheme.name, scheme.top_k) == ("top-k", 0.25)
    assert scheme.sizes(1000)["values"] == (torch.int8, 250)
    compression = FederationConfig.model_fields["compression"].annotation
    assert set(compression.__args__) == set(SCHEMES)  # type: ignore[union-attr]
    assert [make_scheme(name).name for name in SCHEMES] == list(SCHEMES)


SIZE = 1_000


def changed(parts: Tensors, key: str, value: torch.Tensor) -> Tensors:
    return {**parts, key: value}


@pytest.mark.parametrize("name", NAMES)
def test_other_arrays_are_refused(name: str) -> None:
    scheme = make_scheme(name)
    parts = encode(normal(SIZE), scheme)
    values = parts["values"]
    wrong = [
        {},
        changed(parts, "more", torch.zeros(1)),
        changed(parts, "more", torch.zeros(1, 1)),
        changed(parts, "before", torch.zeros(1, dtype=torch.int64)),
        changed(parts, "values", values[:-1]),
        changed(parts, "values", torch.cat((values, values[:1]))),
        changed(parts, "values", values[None]),
        changed(parts, "values", values.double()),
        *({k: v for k, v in parts.items() if k != left_out} for left_out in parts),
    ]
    for arrays in wrong:
        with pytest.raises(ValueError, match="other arrays"):
            check_parts(arrays, scheme, size=SIZE)
    with pytest.raises(ValueError, match="other arrays"):
        check_parts(parts, scheme, size=SIZE + 300)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e37])
def test_steps_that_are_not_finite_or_negative_are_refused(name: str, value: float) -> None:
    scheme = make_scheme(name)
    parts = encode(normal(SIZE), scheme)
    for key in {"unit", "scales"} & parts.keys():
        wrong = parts[key].clone()
        wrong[-1] = value
        with pytest.raises(ValueError, match="steps"):
            check_parts(changed(parts, key, wrong), scheme, size=SIZE)


@pytest.mark.parametrize("size", [1, 8, 1_000, 1_003])
def test_a_bitmap_of_another_count_is_refused(size: int) -> None:
    scheme = make_scheme("top-k")
    parts = encode(normal(size), scheme)
    for bits in range(8):
        bitmap = parts["bitmap"].clone()
        bitmap[-1] ^= 1 << bits
        with pytest.raises(ValueError, match="bitmap"):
            check_parts(changed(parts, "bitmap", bitmap), scheme, size=size)


def test_marks_beyond_the_last_value_are_refused() -> None:
    """As many marks as values, but one of them is on a value that doesn't exist."""
    scheme = make_scheme("top-k")
    parts = encode(torch.arange(1_003.0), scheme)
    bitmap = parts["bitmap"].clone()
    bitmap[-1] ^= 0b1100  # the last value is at bit 2
    with pytest.raises(ValueError, match="bitmap"):
        check_parts(changed(parts, "bitmap", bitmap), scheme, size=1_003)


@pytest.mark.parametrize("name", ["none", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_found(name: str, value: float) -> None:
    scheme = make_scheme(name)
    parts = encode(normal(SIZE), scheme)
    wrong = parts["values"].clone()
    wrong[-1] = value
    check_parts(changed(parts, "values", wrong), scheme, size=SIZE)
    finite, _ = finite_and_norm(changed(parts, "values", wrong), scheme, size=SIZE)
    assert not finite


def mutated(parts: Tensors, rng: np.random.Generator) -> Tensors:
    """Change one array: bytes, length, type or shape, or leave it out."""
    parts = dict(parts)
    key = str(rng.choice(sorted(parts)))
    part = parts[key].reshape(-1)
    kind = rng.integers(8 if len(part) else 2)
    if kind == 0:
        del parts[key]
    elif kind == 1:
        parts[str(rng.choice(["before", "values", "bitmap", "scales", "x"]))] = part
    elif kind == 2:
        parts[key] = part[: int(rng.integers(len(part)))]
    elif kind == 3:
        parts[key] = part.to(rng.choice([torch.float64, torch.int64, torch.uint8, torch.bool]))
    elif kind == 4:
        parts[key] = part.reshape(1, -1)
    else:
        data = part.numpy().copy().view(np.uint8)
        where = rng.integers(len(data), size=int(rng.integers(1, 5)))
        data[where] = rng.choice([0x7F, 0x80, 0xFC, 0xFF, int(rng.integers(256))], size=len(where))
        parts[key] = torch.from_numpy(data.view(part.numpy().dtype))
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_thousand_mutations_are_refused_or_decode_within_bounds(name: str) -> None:
    rng = np.random.default_rng(0)
    scheme, outcomes = make_scheme(name), {"refused": 0, "finite": 0, "not finite": 0}
    for _ in range(1000):
        size = int(rng.integers(1, 6_000))
        parts = encode(normal(size), scheme)
        for _ in range(int(rng.integers(1, 3))):
            parts = mutated(parts, rng) if parts else parts
        try:
            check_parts(parts, scheme, size=size)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes[judged(parts, scheme, size, rng)] += 1
    assert min(outcomes["refused"], outcomes["finite"]) > 100
    if name in ("none", "fp16"):
        assert outcomes["not finite"] > 5


def judged(parts: Tensors, scheme: Scheme, size: int, rng: np.random.Generator) -> str:
    whole = decode(parts, scheme, 0, size)
    assert whole.shape == (size,)
    assert whole.dtype == torch.float32
    start, stop = sorted(rng.integers(size + 1, size=2).tolist())
    found: Any = indexed(parts, scheme, size=size)
    np.testing.assert_array_equal(decode(found, scheme, start, stop), whole[start:stop])
    finite, _ = finite_and_norm(parts, scheme, size=size)
    assert finite == bool(whole.isfinite().all())
    return "finite" if finite else "not finite"
