"""Keys and shares against independent implementations."""

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.errors import ProtocolError
from fedseg.privacy.secagg_keys import (
    channel_key,
    commitment,
    join_secret,
    mask_key,
    open_sealed,
    public_key,
    seal,
    self_mask_key,
    split_secret,
)

ONE, OTHER = bytes(range(16)), bytes(range(16, 32))


def times(a: int, b: int) -> int:
    """Product in GF(2^128) of x^128 + x^7 + x^2 + x + 1."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = a << 1, b >> 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
    return product


def power(a: int, n: int) -> int:
    result = 1
    while n:
        if n & 1:
            result = times(result, a)
        a, n = times(a, a), n >> 1
    return result


def lagrange_at_zero(points: dict[int, int]) -> int:
    total = 0
    for x, y in points.items():
        for other in points:
            if other != x:
                y = times(y, times(other, power(x ^ other, 2**128 - 2)))
        total ^= y
    return total


@given(secret=st.binary(min_size=16, max_size=16), size=st.integers(2, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_enough_shares_restore_a_secret_and_fewer_do_not(
    secret: bytes, size: int, data: st.DataObject
) -> None:
    needed = data.draw(st.integers(2, size))
    shares = dict(enumerate(split_secret(secret, holders=size, needed=needed)))
    some = data.draw(st.sampled_from(list(itertools.combinations(range(size), needed))))
    chosen = {place: shares[place] for place in some}
    assert join_secret(chosen, needed=needed) == secret
    assert join_secret(shares, needed=needed) == secret
    points = {place + 1: int.from_bytes(share, "big") for place, share in chosen.items()}
    assert lagrange_at_zero(points).to_bytes(16, "big") == secret
    del chosen[some[0]]
    with pytest.raises(ProtocolError, match="at least"):
        join_secret(chosen, needed=needed)
    if needed > 2:
        assert join_secret(chosen, needed=needed - 1) != secret


def test_both_sides_agree_and_each_use_has_its_own_key() -> None:
    one, other = public_key(ONE), public_key(OTHER)
    assert mask_key(ONE, other, b"round 1") == mask_key(OTHER, one, b"round 1")
    there = channel_key(ONE, other, b"round 1", sender=0, to=1)
    assert there == channel_key(OTHER, one, b"round 1", sender=0, to=1)
    keys = [
        there,
        channel_key(ONE, other, b"round 1", sender=1, to=0),
        mask_key(ONE, other, b"round 1"),
        mask_key(ONE, other, b"round 2"),
        self_mask_key(ONE, b"round 1"),
        self_mask_key(ONE, b"round 2"),
        commitment(ONE),
        one,
    ]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}


def test_shares_open_only_as_they_were_sealed() -> None:
    key = channel_key(ONE, public_key(OTHER), b"round 1", sender=0, to=1)
    sealed = seal(key, (ONE, OTHER), b"round 1")
    assert open_sealed(key, sealed, b"round 1") == (ONE, OTHER)
    back = channel_key(OTHER, public_key(ONE), b"round 1", sender=1, to=0)
    damaged = bytes([sealed[0] ^ 1]) + sealed[1:]
    bad = ((back, sealed, b"round 1"), (key, sealed, b"round 2"), (key, damaged, b"round 1"))
    for arguments in bad:
        with pytest.raises(ProtocolError, match="encrypted for this round"):
            open_sealed(*arguments)
    with pytest.raises(ProtocolError, match="another length"):
        open_sealed(key, seal(key, (ONE,), b""), b"")


@pytest.mark.parametrize("point", [bytes(32), bytes([1] + 31 * [0])])
def test_public_keys_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(ProtocolError, match="low order"):
        mask_key(ONE, point, b"")


def test_a_secret_has_a_proper_private_key() -> None:
    generated = X25519PrivateKey.generate()
    assert len(public_key(ONE)) == len(generated.public_key().public_bytes_raw())
    assert public_key(ONE) != public_key(OTHER)
