"""Start from weights that exist: a run, a model file, a MONAI bundle, a checkpoint, the demo."""

import itertools
import pickletools
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedseg.data.plan import CLASSES, Plan
from fedseg.errors import FedSegError, ModelError
from fedseg.segmentation.model_file import find_model, read_model_file

__all__ = ["MAX_BYTES", "Source", "fit_weights", "read_weights", "start_from"]

MAX_BYTES = 4 * 2**30
"""No checkpoint is read that is larger, or would be once unpacked."""

_KEY = "model.init-from"
_PREFIXES = ("", "module.", "model.", "network.", "net.", "_orig_mod.")
_NESTS = ("state_dict", "model_state_dict", "model", "network", "network_weights")
_IN_BUNDLE = "models/model.pt"
_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|parameter)\w*|torch Size|"
    r"torch(\.storage)? \w+Storage|torch (b?float|u?int)\d+|torch bool|torch device"
)
"""What a pickle of a state dict names, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights to start from.

    Attributes:
        name: What the user typed.
        state: Name to tensor.
        plan: Of a model file of FedSeg; None elsewhere.
    """

    name: str
    state: Mapping[str, torch.Tensor]
    plan: Plan | None = None


def start_from(
    network: nn.Module, source: str, *, allow_partial: bool = False, runs: Path | None = None
) -> list[str]:
    """Read weights and put them into a network; see `read_weights` and `fit_weights`."""
    return fit_weights(network, read_weights(source, runs=runs), allow_partial=allow_partial)


def read_weights(source: str, *, runs: Path | None = None) -> Source:
    """Read a run (folder or id: its best model), `.safetensors`, `.pt`, MONAI bundle or `demo`.

    Checkpoints are read by torch's weights-only loader, which builds tensors and runs no code of
    the file.

    Args:
        source: What the user typed.
        runs: Where runs are; None: `output.dir`'s default.

    Raises:
        ModelError: It isn't there, is damaged, too large, or holds anything but weights.
    """
    path = find_model(source, runs=runs)
    try:
        if path.is_dir():
            inside = path / _IN_BUNDLE
            if not inside.is_file():
                raise ModelError(
                    f"{_KEY}: {path} has neither model-best.safetensors nor {_IN_BUNDLE}; give a "
                    "run or a MONAI bundle"
                )
            return Source(name=source, state=_checkpoint(inside))
        if not path.is_file():
            raise ModelError(
                f"{_KEY}: got '{source}', no such run or file; expected a run's id or folder, a "
                ".safetensors, a .pt, a MONAI bundle or demo"
            )
        if path.suffix == ".safetensors":
            return _safetensors(source, path)
        if path.suffix == ".zip":
            return Source(name=source, state=_zipped_bundle(path))
        return Source(name=source, state=_checkpoint(path))
    except OSError as error:
        raise ModelError(f"{_KEY}: {path} can't be read ({error.strerror}); mend that") from None


def _safetensors(source: str, path: Path) -> Source:
    try:
        state, plan, _ = read_model_file(path)
        return Source(name=source, state=state, plan=plan)
    except FedSegError:
        pass  # another program's, or damaged: the next line tells
    try:
        return Source(name=source, state=load_file(path))
    except SafetensorError as error:
        raise ModelError(
            f"{_KEY}: {path} is no readable .safetensors file ({error}); copy it again"
        ) from None


def _zipped_bundle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as bundle:
            found = [name for name in bundle.namelist() if f"/{name}".endswith(f"/{_IN_BUNDLE}")]
            if len(found) != 1:
                raise ModelError(
                    f"{_KEY}: {path} holds {len(found)} files {_IN_BUNDLE}; expected one, as a "
                    "zipped MONAI bundle has"
                )
            _check_bytes(path, bundle.getinfo(found[0]).file_size)
            with bundle.open(found[0]) as inside, tempfile.TemporaryFile() as file:
                shutil.copyfileobj(inside, file)
                return _loaded(path, file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _checkpoint(path: Path) -> dict[str, torch.Tensor]:
    _check_bytes(path, path.stat().st_size)
    with path.open("rb") as file:
        return _loaded(path, file)


def _loaded(path: Path, file: BinaryIO | Any) -> dict[str, torch.Tensor]:
    """Unpack a checkpoint, once it is known to hold tensors and to be of a sane size."""
    try:
        with zipfile.ZipFile(file) as parts:
            _check_bytes(path, sum(part.file_size for part in parts.infolist()))
            for name in parts.namelist():
                if name.endswith("data.pkl"):
                    _check_pickle(path, parts.read(name))
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except zipfile.BadZipFile:
        raise _damaged(path, "is damaged, or no file of torch.save since torch 1.6") from None
    except Exception as error:  # a hostile file can raise anything
        raise _damaged(path, error) from None
    return dict(_tensors(path, content))


def _check_pickle(path: Path, content: bytes) -> None:
    # torch's loader runs no code of a file, but it makes bytearrays of any length.
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _OF_TENSORS.fullmatch(
            str(argument)
        ):
            raise ModelError(
                f"{_KEY}: {path} holds more than weights ({argument}), and what is no weight is "
                "never loaded; save its state_dict() alone"
            )


def _damaged(path: Path, what: str | Exception) -> ModelError:
    if isinstance(what, Exception):
        first = (str(what).strip() or type(what).__name__).splitlines()[0]
        what = f"can't be read ({first[:200]})"
    return ModelError(f"{_KEY}: {path} {what}; copy it again")


def _check_bytes(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise ModelError(
            f"{_KEY}: {path} has {size / 1e9:.1f} GB; expected at most {MAX_BYTES / 1e9:.1f} GB; "
            "save its state_dict() alone"
        )


def _tensors(path: Path, content: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Find the state dict, at the top or one of the usual places in it."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        found = [(k, v) for k, v in content.items() if isinstance(v, torch.Tensor)]
        if found:
            yield from ((str(name), tensor) for name, tensor in found)
            return
        content = next((content[key] for key in _NESTS if key in content), None)
    raise ModelError(
        f"{_KEY}: {path} holds no tensors by name; expected a state dict, at the top or under "
        f"{', '.join(_NESTS)}"
    )


def fit_weights(network: nn.Module, source: Source, *, allow_partial: bool = False) -> list[str]:
    """Put weights into a network; what they don't have stays as it is: seeded.

    Prefixes such as `module.` are left out. A different number of classes makes only the head
    start anew, and needs no consent.

    Args:
        network: The network, with seeded weights; changed only if all is well.
        source: The weights.
        allow_partial: Whether other tensors may be missing or of another shape.

    Returns:
        What became of it, one line each, for the log.

    Raises:
        ModelError: Nothing fits, or only a part and that isn't allowed.
    """
    own = network.state_dict()
    state = _renamed(source.state, own)
    fitting = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    if not fitting:
        raise ModelError(
            f"{_KEY}: '{source.name}' shares no tensor with the network{_told(source.plan)}; "
            "set model.* to its network's"
        )
    _check_finite(source, fitting)
    missing = [name for name in own if name not in state]
    other = [name for name in own if name in state and name not in fitting]
    classes = _other_classes(own, state, other)
    other = [] if classes else other
    unused = [name for name in state if name not in own]
    if (missing or other) and not allow_partial:
        first = _some(_described(own, state, [*other, *missing]))
        raise ModelError(
            f"{_KEY}: {len(other)} of {len(own)} tensors of '{source.name}' have another shape and "
            f"{len(missing)} are missing ({first}){_told(source.plan)}; set model.* to its "
            "network's, or model.init-partial=true to start those anew"
        )
    network.load_state_dict({**own, **fitting})
    notes = [f"{len(fitting)} of {len(own)} tensors from '{source.name}'"]
    if classes:
        notes.append(f"it has {classes} classes, the study {CLASSES}: the head starts anew")
    notes += [f"starts anew: {line}" for line in _described(own, state, [*other, *missing])]
    if unused:
        notes.append(f"not used: {_some(unused)}")
    return notes


def _renamed(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Leave out, or add, those prefixes with which most tensors fit."""
    strips = sorted({a + b for a, b in itertools.product(_PREFIXES, repeat=2)}, key=len)
    best: dict[str, torch.Tensor] = {}
    most = -1
    for strip, add in itertools.product(strips, _PREFIXES):
        names = {add + n[len(strip) :]: t for n, t in state.items() if n.startswith(strip)}
        fits = sum(name in own and own[name].shape == t.shape for name, t in names.items())
        if fits > most:
            best, most = names, fits
    return best


def _other_classes(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], other: list[str]
) -> int | None:
    """Number of classes of the source, where that alone is why tensors don't fit."""
    found: set[int] = set()
    for name in other:
        ours, theirs = tuple(own[name].shape), tuple(state[name].shape)
        if len(ours) != len(theirs) or ours[2:] != theirs[2:]:
            return None
        pairs = {(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True) if a != b}
        if any(a != CLASSES for a, _ in pairs):
            return None
        found |= {b for _, b in pairs}
    return found.pop() if len(found) == 1 else None


def _check_finite(source: Source, state: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ModelError(f"{_KEY}: '{source.name}' has NaN or Inf in {_some(bad)}; take another")


def _described(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], names: Iterable[str]
) -> list[str]:
    return [
        f"{name} {list(own[name].shape)}"
        + (f", there {list(state[name].shape)}" if name in state else ", not there")
        for name in names
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more


def _told(plan: Plan | None) -> str:
    if plan is None:
        return ""
    return f"; its network is {plan.model} of width {plan.width} and depth {plan.depth}"
