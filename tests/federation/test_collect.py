"""Hostile updates are turned away before anything is decoded."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.arrays import state_to_arrays
from fedseg.errors import Reason
from fedseg.federation.collect import Inbox, read_update
from fedseg.federation.compression import make_scheme
from fedseg.federation.flat import layout_of

LIKE = {"w": torch.zeros(3, 2), "b": torch.zeros(())}
INBOX = Inbox(layout=layout_of(LIKE), scheme=make_scheme("none"), folder=Path())


def test_a_good_update_becomes_one_vector_in_order_of_names() -> None:
    state = {"w": torch.arange(6.0).reshape(3, 2), "b": torch.tensor(9.0)}
    found = read_update(state_to_arrays(state), INBOX)
    assert isinstance(found, dict)
    assert found["values"].tolist() == [9, 0, 1, 2, 3, 4, 5]


def npy(shape: tuple[int, ...], dtype: str, payload: bytes) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + payload


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (3, 2), "numpy.ndarray", npy((10**6, 10**6), "<f4", b"\0" * 24)),
        Array("float32", (3, 2), "numpy.ndarray", npy((3, 2), "|O", b"\0" * 24)),
        Array("float32", (3, 2), "numpy.ndarray", npy((2, 3), "<f4", b"\0" * 24)),
        Array("float32", (3, 2), "numpy.ndarray", npy((3, 2), "<f8", b"\0" * 48)),
        Array("float32", (3, 2), "numpy.ndarray", b"\0" * 10**6),
        Array("float32", (3, 2), "numpy.ndarray", b"\x93NUMPY" + b"\0" * 60),
        Array("float32", (3, 2), "pickle", b"\0" * 100),
        Array("float64", (3, 2), "numpy.ndarray", npy((3, 2), "<f8", b"\0" * 48)),
        Array("nonsense", (3, 2), "numpy.ndarray", npy((3, 2), "<f4", b"\0" * 24)),
    ],
    ids=["huge", "object", "shape", "type", "long", "header", "stype", "double", "dtype"],
)
def test_a_lying_array_is_a_bad_update(array: Array) -> None:
    record = state_to_arrays(LIKE)
    record["w"] = array
    assert read_update(record, INBOX) is Reason.BAD_UPDATE


def test_other_names_are_a_bad_update() -> None:
    assert read_update(state_to_arrays({"w": torch.zeros(3, 2)}), INBOX) is Reason.BAD_UPDATE


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    record = ArrayRecord({"w": Array("float32", (3, 2), "numpy.ndarray", data)})
    inbox = Inbox(
        layout=layout_of({"w": torch.zeros(3, 2)}), scheme=make_scheme("none"), folder=Path()
    )
    found = read_update(record, inbox)
    assert isinstance(found, dict | Reason)
