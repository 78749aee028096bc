"""What a chaos run found, for programs and for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PROMISES = (
    "every version once",
    "nothing committed is lost",
    "nothing is counted twice",
    "replicas are identical",
    "nobody is lost",
    "the run goes on",
)
MOST_LOSS = 0.01  # the final loss may be this much, relative, above that without faults


@dataclass(slots=True)
class Outcome:
    """`violations` by promise; `compared` digests; `goodput` is the committed part of the tokens trained on, 0..1."""

    seed: int
    minutes: float
    workers: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    violations: dict[str, list[str]] = field(default_factory=lambda: {promise: [] for promise in PROMISES})
    compared: int = 0
    commits: int = 0
    longest_wait_s: float = 0.0
    committed_tokens: float = 0.0
    goodput: float = 0.0
    digests_equal: bool = False
    loss: float | None = None
    fault_free_loss: float | None = None

    @property
    def loss_difference(self) -> float | None:
        """Relative, against the run without faults; None if there was none."""
        if self.loss is None or self.fault_free_loss is None:
            return None
        return self.loss / self.fault_free_loss - 1.0

    @property
    def passed(self) -> bool:
        worse = self.loss_difference
        kept = not any(self.violations.values()) and self.digests_equal
        return kept and (worse is None or worse <= MOST_LOSS)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """`passed`, `faults`, `violations`, `goodput`, `digests_equal`, `seed`, and more."""
    return {
        "passed": outcome.passed,
        "seed": outcome.seed,
        "minutes": outcome.minutes,
        "workers": outcome.workers,
        "faults": outcome.faults,
        "violations": [
            f"{promise}: {words}" for promise, found in outcome.violations.items() for words in found
        ],
        "digests_equal": outcome.digests_equal,
        "digests_compared": outcome.compared,
        "commits": outcome.commits,
        "longest_wait_s": round(outcome.longest_wait_s, 2),
        "committed_tokens": round(outcome.committed_tokens),
        "goodput": round(outcome.goodput, 4),
        "loss": outcome.loss,
        "fault_free_loss": outcome.fault_free_loss,
        "loss_difference": outcome.loss_difference,
    }


def render(outcome: Outcome) -> RenderableType:
    """Faults by kind, a line for each promise, and the figures."""
    counts = Counter(f["kind"] for f in outcome.faults)
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items()))
    head = Text(f"{len(outcome.faults)} faults: ", style="bold").append(kinds or "none", style="")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("promise", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("violations")
    for promise, found in outcome.violations.items():
        words = "\n".join(found[:5]) + (f"\nand {len(found) - 5} more" if len(found) > 5 else "")
        table.add_row(promise, _mark(not found), Text(words))
    ended = "" if outcome.digests_equal else "the run did not end with equal digests"
    table.add_row("final digests are equal", _mark(outcome.digests_equal), Text(ended))
    return Group(head, Text(), table, Text(), _figures(outcome), _verdict(outcome))


def _mark(kept: bool) -> Text:
    return Text("kept", style="green") if kept else Text("BROKEN", style="bold red")


def _figures(outcome: Outcome) -> Text:
    text = Text(
        f"{outcome.commits:,} commits, {outcome.compared:,} digests of replicas compared, longest time without a "
        f"commit {outcome.longest_wait_s:.1f} s\ngoodput {outcome.goodput:.1%}: the committed part of the tokens "
        "trained on"
    )
    if outcome.loss is not None:
        text.append(f"\nheld-out loss {outcome.loss:.4f} nats/byte")
    worse = outcome.loss_difference
    if worse is not None:
        style = "green" if worse <= MOST_LOSS else "bold red"
        text.append(f", {worse:+.2%} against {outcome.fault_free_loss:.4f} without faults", style=style)
    return text


def _verdict(outcome: Outcome) -> Text:
    seed = f" (seed {outcome.seed})"
    return (
        Text("PASSED" + seed, style="bold green")
        if outcome.passed
        else Text("FAILED" + seed, style="bold red")
    )
