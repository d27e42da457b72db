"""JSON with a few values, at any depth, replaced by anything or left out: for fuzzing readers."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

__all__ = ["ANYTHING", "spoilt"]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to all values below this one."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield (*at, key)
        yield from _places(value[key], (*at, key))


@st.composite
def spoilt(draw: st.DrawFn, valid: Any) -> Any:
    """Something valid, spoilt at one to three places."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = [(), *_places(found)]
        # Shallow places are few and deep ones many: each depth is as likely.
        depth = draw(st.integers(0, max(map(len, places))))
        *way, last = draw(st.sampled_from([p for p in places if len(p) == depth])) or [None]
        if last is None:
            return draw(ANYTHING)
        holder = found
        for key in way:
            holder = holder[key]
        if draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = draw(ANYTHING)
    return found
