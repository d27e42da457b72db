"""Read the `dataset.json` of the Medical Segmentation Decathlon and of nnU-Net."""

import json
from pathlib import Path
from typing import Any

from fedseg.errors import DataError

__all__ = ["DATASET_JSON", "label_names", "read_dataset_json"]

DATASET_JSON = "dataset.json"
_MAX_BYTES = 2**24


def read_dataset_json(root: Path) -> dict[str, Any]:
    """Read the file as an object.

    Raises:
        DataError: It is missing, no JSON, no object, or too large.
    """
    path = root / DATASET_JSON
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise DataError(f"{path}: over {_MAX_BYTES} bytes; expected names of labels and files")
        content = json.loads(data)
    except FileNotFoundError:
        raise DataError(
            f"{root}: no dataset.json; expected imagesTr/, labelsTr/ and dataset.json; add it"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not valid JSON; mend it or copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); correct it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected an object; mend it")
    return content


def label_names(root: Path, content: dict[str, Any]) -> dict[str, int]:
    """Return name to mask value, of MSD and nnU-Net 1 (value to name) or nnU-Net 2 (the reverse).

    A region of nnU-Net 2, such as `"liver": [1, 2]` beside `"tumor": 2`, stands for the value that
    no smaller one has.

    Raises:
        DataError: `labels` is missing or has another form.
    """
    path = root / DATASET_JSON
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DataError(f'{path}: no labels; expected such as "labels": {{"0": "background", ...}}')
    try:
        if all(key.strip().isdigit() for key in labels):
            names = {_text(name): int(value) for value, name in labels.items()}
        else:
            names = _smallest({name: _values(given) for name, given in labels.items()})
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: labels: {error}; mend it") from None
    if len(names) < len(labels):
        raise DataError(f"{path}: labels: two values have one name; give each its own")
    return names


def _text(name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"got {name!r}, expected a name")
    return name


def _values(given: object) -> list[int]:
    values: list[Any] = given if isinstance(given, list) else [given]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"got {value!r}, expected a whole number")
    return values


def _smallest(regions: dict[str, list[int]]) -> dict[str, int]:
    names: dict[str, int] = {}
    for name, values in sorted(regions.items(), key=lambda item: len(item[1])):
        left = [value for value in values if value not in names.values()]
        if len(left) != 1:
            raise ValueError(f"'{name}' is {values}, expected one value that no other name has")
        names[name] = left[0]
    return {name: names[name] for name in regions}
