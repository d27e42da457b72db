"""Tests of what label names mean."""

import pytest

from fedseg.data.labels import label_of_name, label_of_segment


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *[(name, 0) for name in ("background", "Background", " BACKGROUND ")],
        *[(name, 1) for name in ("liver", "Liver", "liver parenchyma", "Liver_1")],
        *[(name, 2) for name in ("tumor", "Tumour", "cancer", "Lesion", "lesions", "liver tumor")],
        *[(name, 2) for name in ("liver-lesion", "hepatic tumour", "Tumor 2", "Mass", "HCC")],
        *[
            (name, None)
            for name in ("", "7", "spleen", "kidney tumor", "liver vessels", "no liver")
        ],
        *[(name, None) for name in ("parenchyma", "background liver", "pancreas", "ignore")],
    ],
)
def test_names(name: str, label: int | None) -> None:
    assert label_of_name(name) == label


def test_segment_is_looked_up_by_name_then_by_number() -> None:
    assert label_of_segment(1, "Liver", None) == 1
    assert label_of_segment(1, "Spleen", None) is None
    assert label_of_segment(1, " Spleen", {"spleen": 0, 1: 2}) == 0
    assert label_of_segment(1, "Liver", {1: 2}) == 2
    assert label_of_segment(3, "Liver", {1: 2}) is None
