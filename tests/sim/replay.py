"""Run seeds of the simulation again: `python -m tests.sim.replay SEED...`; a failing one is shrunk and shown."""

from __future__ import annotations

import sys
import time

from tests.sim.scenario import Scenario, scenario
from tests.sim.trial import outcome_of, shrunk_by_running


def describe(s: Scenario) -> str:
    lines = [
        f"seed {s.seed}: {s.workers} workers, standby {s.standby}, delays only {s.delays_only}, {s.weather}"
    ]
    lines += [f"  {name}: " + ", ".join(f"{k}={v}" for k, v in values) for name, values in s.sections]
    lines += [
        f"  at {f.at:g} s: {f.kind} who={f.who} other={f.other} lasts={f.lasts_s:g} s amount={f.amount:g}"
        for f in s.faults
    ]
    return "\n".join(lines)


def explain(seed: int) -> str:
    """What a failing seed does, with as few faults as possible; "" if it does not fail."""
    drawn = scenario(seed)
    first = outcome_of(drawn)
    if not first.violation:
        return ""
    smallest = shrunk_by_running(drawn)
    last = outcome_of(smallest).violation
    return f"{first.violation}\nwith {len(smallest.faults)} of {len(drawn.faults)} faults: {last}\n{describe(smallest)}"


def main(seeds: list[int]) -> int:
    failed = 0
    for seed in seeds:
        begun = time.process_time()
        found = explain(seed)
        failed += bool(found)
        result = outcome_of(scenario(seed)) if not found else None
        words = found or (result and f"fine, {result.events} events, {result.virtual_s:.1f} virtual seconds")
        print(f"seed {seed}: {words} ({time.process_time() - begun:.2f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
