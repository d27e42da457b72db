"""Hostile updates are turned away before anything is decoded."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedseg.arrays import state_to_arrays
from fedseg.errors import Reason
from fedseg.federation.collect import Inbox, read_update
from fedseg.federation.compression import make_scheme
from fedseg.federation.flat import layout_of

LIKE = {"w": torch.zeros(3, 2), "b": torch.zeros(())}
INBOX = Inbox(layout=layout_of(LIKE), scheme=make_scheme("none"), folder=Path())


def test_a_good_update_is_one_vector() -> None:
    found = read_update(state_to_arrays({"values": torch.arange(7.0)}), INBOX)
    assert isinstance(found, dict)
    assert found["values"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def npy(shape: tuple[int, ...], dtype: str, payload: bytes) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + payload


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (7,), "numpy.ndarray", npy((10**12,), "<f4", b"\0" * 28)),
        Array("float32", (7,), "numpy.ndarray", npy((7,), "|O", b"\0" * 28)),
        Array("float32", (7,), "numpy.ndarray", npy((7, 1), "<f4", b"\0" * 28)),
        Array("float32", (7,), "numpy.ndarray", npy((7,), "<f8", b"\0" * 56)),
        Array("float32", (7,), "numpy.ndarray", b"\0" * 10**6),
        Array("float32", (7,), "numpy.ndarray", b"\x93NUMPY" + b"\0" * 60),
        Array("float32", (7,), "pickle", npy((7,), "<f4", b"\0" * 28)),
        Array("float64", (7,), "numpy.ndarray", npy((7,), "<f8", b"\0" * 56)),
        Array("nonsense", (7,), "numpy.ndarray", npy((7,), "<f4", b"\0" * 28)),
    ],
    ids=["huge", "object", "shape", "type", "long", "header", "stype", "double", "dtype"],
)
def test_a_lying_array_is_a_bad_update(array: Array) -> None:
    assert read_update(ArrayRecord({"values": array}), INBOX) is Reason.BAD_UPDATE


def test_other_names_are_a_bad_update() -> None:
    assert read_update(state_to_arrays({"w": torch.zeros(7)}), INBOX) is Reason.BAD_UPDATE


@given(st.binary(max_size=300))
@example(npy((7,), "<f4", b"\0" * 28))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    record = ArrayRecord({"values": Array("float32", (7,), "numpy.ndarray", data)})
    found = read_update(record, INBOX)
    assert isinstance(found, dict | Reason)
