"""Lines of `history.jsonl`: what they hold, which number in them is the score, how they read."""

import re
from collections.abc import Mapping
from typing import Any

from fedseg.data.plan import REGIONS
from fedseg.errors import REASONS, ConfigError
from fedseg.registry import did_you_mean
from fedseg.segmentation.metrics import empty_sums, summarise

__all__ = ["check_monitor", "headline", "in_words", "new_line", "score", "why"]


def new_line(number: int, entries: Mapping[str, Any], *, seconds: float = 0.0) -> dict[str, Any]:
    """Make a line with every key that a reader may rely on; sites are in order of their names."""
    defaults: dict[str, Any] = {
        "global": {},
        "federated": {},
        "sites": {},
        "bytes_up": 0,
        "bytes_down": 0,
        "privacy": None,
    }
    line = {"round": number, **defaults, **entries, "seconds": round(seconds, 3)}
    line["sites"] = {name: line["sites"][name] for name in sorted(line["sites"])}
    return line


def score(line: Mapping[str, Any], monitor: str = "") -> tuple[int, float] | None:
    """What the best model is chosen by, None where the line has none.

    Rounds compare by the number of regions scored first: without the one site that annotates
    tumour a round's mean Dice is the liver's alone, and higher than that of any whole round.

    Args:
        line: A line of the history.
        monitor: `scope.metric`, e.g. `federated.liver.dice`; `""`: the mean Dice of the regions on
            the server's cases where it has any, else on the sites'.

    Returns:
        Number of regions in it, and the metric.
    """
    if monitor:
        scope, _, metric = monitor.partition(".")
        value = line.get(scope, {}).get(metric)
        return None if value is None else (1, float(value))
    for scope in ("global", "federated"):
        found = [line.get(scope, {}).get(f"{region}.dice") for region in REGIONS]
        known = [value for value in found if value is not None]
        if known:
            return len(known), float(sum(known) / len(known))
    return None


_NOT_A_SCORE = re.compile(r"hd95|assd|volume_(abs_)?(error_)?ml|false|cases|skipped|lesions")
"""Counts, and what is better where it is lower: the best model has the highest score."""


def check_monitor(monitor: str) -> None:
    """Check `federation.monitor` before anything starts.

    Raises:
        ConfigError: No line of the history can have such a metric.
    """
    keys = [key for key in summarise(empty_sums()) if not _NOT_A_SCORE.search(key)]
    known = [f"{scope}.{key}" for scope in ("global", "federated") for key in keys]
    if monitor and monitor not in known:
        raise ConfigError(
            f"federation.monitor: got '{monitor}'{did_you_mean(monitor, known)}; expected global "
            "or federated, a region and a metric, e.g. federated.liver.dice"
        )


def why(site: Mapping[str, Any]) -> str:
    """Say in words what became of a site's round."""
    if site["status"] == "ok":
        return "ok"
    return f"{site['status']}, {in_words(site['reason'], site.get('detail'))}"


def in_words(reason: str | None, detail: str | None = "") -> str:
    """Say a reason's code in words; one of another version stays as it is."""
    known = {code.value: words for code, words in REASONS.items()}
    words = known.get(reason, reason) if reason else "no reason given"
    return f"{words} ({detail})" if detail else words


def headline(line: Mapping[str, Any], rounds: int) -> str:
    """One line for the log."""
    parts = [f"round {line['round']}/{rounds} in {line['seconds']:.0f} s"]
    if "failed" in line:
        parts.append(f"failed, the model stays as it is: {line['failed']}")
    losses = [s["training"]["loss"] for s in line["sites"].values() if s.get("training")]
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.3f}")
    if "secagg" in line:
        parts.append(f"loss {line['secagg']['sums']['loss'] / line['secagg']['summed']:.3f}")
    for scope in ("global", "federated"):
        for region in REGIONS:
            value = line[scope].get(f"{region}.dice")
            if value is not None:
                parts.append(f"{scope} {region} Dice {value:.3f}")
    return " · ".join(parts)
