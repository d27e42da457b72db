"""Tests of names and decimals in tables: the same in the terminal and in the report."""

import pytest

from fedseg.report.amounts import METRICS, metric_name, value_of, written
from fedseg.segmentation.metrics import empty_sums, summarise


def test_every_metric_of_a_summary_has_a_name() -> None:
    summary = summarise({**empty_sums(), "surfaces": 1.0})
    found = {key.partition(".")[2] for key in summary if "." in key}
    found = {metric.removesuffix(".cases").removesuffix(".pooled") for metric in found}
    names = [metric_name(metric) for metric in found]
    assert not any("_" in name for name in names)
    assert len(set(names)) == len(found)
    assert {metric_name(metric) for metric in METRICS} <= set(names)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("tumor.lesions_found_small", 3.0, "3"),
        ("tumor.lesion_f1_small", 0.5, "0.500"),
        ("liver.volume_ml", 1500.04, "1500.0"),
        ("liver.volume_error_ml", -0.376, "\N{MINUS SIGN}0.4"),
        ("tumor.hd95", 41.111, "41.11"),
        ("tumor.lesions_false_per_scan", 2.0, "2.00"),
    ],
)
def test_decimals_are_those_of_the_metric(key: str, value: float, text: str) -> None:
    assert value_of({key: value}, key).text == text
    assert written(value, key.partition(".")[2]) == text.replace("\N{MINUS SIGN}", "-")
    assert written(None, "dice") == "-"
