"""What the rounds cost: seconds, bytes each way, and privacy."""

from fedseg.privacy.mechanisms import MEMBERS
from fedseg.report.amounts import seconds, size
from fedseg.report.figures import Series, bar_chart
from fedseg.report.quality import Figure
from fedseg.report.run import Run, Scores
from fedseg.report.run_files import table, text

__all__ = ["costs", "privacy", "spent_words", "totals"]


def totals(run: Run) -> list[tuple[str, str]]:
    """Sum up the run: rounds, sites, time, bytes."""
    trained = [part for part in run.rounds if part.number > 0]
    sites = {name for part in trained for name in part.sites}
    up, down = sum(part.bytes_up for part in trained), sum(part.bytes_down for part in trained)
    of = f" of {run.wanted_rounds}" if run.wanted_rounds not in (0, len(trained)) else ""
    return [
        ("rounds", f"{len(trained)}{of}"),
        ("sites", str(len(sites or table(run.manifest.get("sites"))))),
        ("time", seconds(sum(part.seconds for part in run.rounds))),
        ("sent by the sites", size(up)),
        ("sent to the sites", size(down)),
    ]


def costs(run: Run) -> list[Figure]:
    """Draw seconds and megabytes of each round."""
    trained = [part for part in run.rounds if part.number > 0]
    if not trained:
        return []
    time = Series(
        name="seconds", style="bar-one", points=[(part.number, part.seconds) for part in trained]
    )
    up = Series(
        name="from the sites",
        style="bar-one",
        points=[(part.number, part.bytes_up / 1e6) for part in trained],
    )
    down = Series(
        name="to the sites",
        style="bar-two",
        points=[(part.number, part.bytes_down / 1e6) for part in trained],
    )
    total = sum(part.seconds for part in trained)
    slowest = max(trained, key=lambda part: part.seconds)
    moved = sum(part.bytes_up + part.bytes_down for part in trained)
    return [
        Figure(
            drawing=bar_chart(
                "seconds",
                "Seconds of each round",
                f"{len(trained)} rounds took {seconds(total)}; the longest was round "
                f"{slowest.number} with {seconds(slowest.seconds)}.",
                [time],
                unit="s",
            ),
            caption="Seconds a round",
        ),
        Figure(
            drawing=bar_chart(
                "bytes",
                "Megabytes sent in each round",
                f"{size(moved)} were sent in {len(trained)} rounds: "
                f"{size(sum(part.bytes_up for part in trained))} from the sites, "
                f"{size(sum(part.bytes_down for part in trained))} to them.",
                [up, down],
                unit="MB",
            ),
            caption="Megabytes (MB) a round",
            legend=[("bar-one", up.name, "bar"), ("bar-two", down.name, "bar")],
        ),
    ]


def spent_words(spent: Scores) -> str:
    """What was spent, and the mechanism's numbers, in one line."""
    return ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in spent.items())


def privacy(run: Run) -> list[str]:
    """Say what was spent, and what protects the updates."""
    section = table(run.config.get("privacy"))
    mode, summed = text(section.get("mode")) or "none", section.get("secure-aggregation") is True
    spent = next((part for part in reversed(run.rounds) if part.privacy), None)
    lines = []
    if spent is not None and spent.privacy:
        protects = f", which protects {MEMBERS[mode]}" if mode in MEMBERS else ""
        lines.append(
            f"Spent up to round {spent.number} (privacy.mode is {mode}{protects}): "
            f"{spent_words(spent.privacy)}. Epsilon bounds how much the models can depend on what "
            "is protected; the smaller, the better. Metrics and fingerprints aren't covered."
        )
    elif mode == "none":
        lines.append(
            "No differential privacy (privacy.mode is none): nothing bounds what the models may "
            "tell about the training cases."
        )
    else:
        lines.append(f"No spending is written down yet (privacy.mode is {mode}).")
    if ended := text(run.manifest.get("ended")):
        lines.append(f"Training ended {ended}.")
    lines.append(
        "Secure aggregation: the server saw only the sum of the updates."
        if summed
        else "No secure aggregation: the server saw each site's update as it is."
    )
    return lines
