"""What happens in a simulated run, drawn from a seed and nothing else: the run's settings, and its faults by time.

Faults are values and independent of each other, so that a failing run can be shrunk by leaving some of them out.
Who performs them is in `tests.sim.trial`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from diloco.comms.sim import Weather
from diloco.config import RunConfig
from tests.toy import config

STEPS = {1: 50, 2: 24, 3: 16, 4: 13, 5: 11, 6: 10}  # inner steps by workers, so that every run has 200 events
FEWEST_STEPS = 6

# How long silence and waiting may last, in virtual seconds.
HASTY = {
    "heartbeat_s": 1.0,
    "suspect_s": 2.5,
    "dead_s": 5.0,
    "fixed_grace_s": 1.0,
    "round_timeout_s": 8.0,
    "standby_s": 1.5,
    "takeover_s": 1.5,
}
# Nobody is given up: faults that only delay may then change no bit of the result.
PATIENT = HASTY | {"suspect_s": 80.0, "dead_s": 300.0, "fixed_grace_s": 400.0, "round_timeout_s": 900.0}

CALM = Weather()
ROUGH = Weather(delay_s=(0.001, 0.6), duplicate=0.2, drop=0.03)
STORM = Weather(delay_s=(0.01, 1.0), duplicate=0.3, drop=0.12)

DELAYS = (
    "kill coordinator",
    "disk full",
    "stop coordinator",
    "part",
    "isolate",
    "slow link",
    "storm",
    "replay",
    "stop worker",
    "slow worker",
    "tamper",
)
FAULTS = (*DELAYS, "kill worker", "restart worker", "corrupt", "nan", "flip signs")


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` at virtual second `at`: `who` and `other` are numbers to be taken modulo what there is."""

    at: float
    kind: str
    who: int = 0
    other: int = 0
    lasts_s: float = 0.0
    amount: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. `delays_only`: its result must be that of the undisturbed run, bit for bit."""

    seed: int
    workers: int
    standby: bool
    delays_only: bool
    weather: Weather
    sections: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    faults: tuple[Fault, ...]

    @property
    def config(self) -> RunConfig:
        return config(**{name: dict(values) for name, values in self.sections})

    @property
    def tampered(self) -> bool:
        return any(fault.kind == "tamper" for fault in self.faults)

    @property
    def bound_s(self) -> float:
        """Virtual seconds that the run may take: its own time, and for each fault what was configured."""
        c = self.config
        fault, own = c.fault, 4.0 * c.run.inner_steps_total + 60.0
        each = fault.dead_s + 2 * fault.round_timeout_s + (fault.fixed_grace_s or 0.0) + 30.0
        slow = sum(f.amount * c.run.inner_steps_total for f in self.faults if f.kind.startswith("slow"))
        return own + slow + sum(f.lasts_s + each for f in self.faults)


def scenario(seed: int) -> Scenario:
    """The run of this seed."""
    draw = random.Random(seed)
    workers = draw.choice((1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 8, 11, 16))
    standby = draw.random() < 0.4
    delays_only = draw.random() < 0.4
    down = draw.choice(("g_fp32", "g_fp32", "relay", "relay", "mean_q", "q4_ef", "g_bf16"))
    total, H = STEPS.get(workers, FEWEST_STEPS), draw.choice((2, 3, 5))
    chosen: dict[str, dict[str, Any]] = {
        "run": {"inner_steps_total": total, "seed": seed % 7},
        "stream": {"H": H, "tau": draw.randrange(min(3, H)), "alpha": draw.choice((0.0, 0.5))},
        "codec": {"up": draw.choice(("fp32", "e3m0")), "down": down, "ef": draw.choice(("on", "off"))},
        "topology": {
            "workers": workers,
            "checkpoint_every_commits": draw.choice((1, 3, 50)),
            "standby": "auto" if standby else "off",
        },
        "fault": dict(PATIENT if delays_only else HASTY),
        "robust": {"kind": "clip_median" if draw.random() < 0.2 else "mean"},
    }
    if not delays_only and draw.random() < 0.3:
        chosen["fault"]["quorum"] = draw.randrange(1, workers + 1)
    count = draw.randrange(1, 6)
    faults = [_fault(draw, DELAYS if delays_only else FAULTS, total) for _ in range(count)]
    weather = draw.choice((CALM, ROUGH, STORM))
    if draw.random() < 0.25:
        chosen |= {"data": {"mode": "leased"}, "model": {"sequence_length": 5}}
    return Scenario(
        seed=seed,
        workers=workers,
        standby=standby,
        delays_only=delays_only,
        weather=weather,
        sections=tuple((name, tuple(values.items())) for name, values in chosen.items()),
        faults=tuple(sorted(faults, key=lambda f: f.at)),
    )


def _fault(draw: random.Random, kinds: tuple[str, ...], total: int) -> Fault:
    kind, at = draw.choice(kinds), draw.uniform(0.0, 1.2 * total + 2.0)
    amount = {
        "kill coordinator": float(draw.randrange(12)),  # actions until then
        "slow link": draw.uniform(0.2, 3.0),  # seconds more for each message
        "slow worker": draw.uniform(1.2, 3.0),  # seconds for a step
        "corrupt": draw.uniform(0.05, 0.4),  # chance of each frame
        "tamper": draw.uniform(0.2, 0.8),
        "replay": float(draw.randrange(5, 40)),  # messages
        "nan": float(draw.randrange(1, total)),  # the inner step
    }.get(kind, 0.0)
    lasts_s = draw.uniform(0.3, 8.0 if kinds == DELAYS or draw.random() < 0.7 else 25.0)
    return Fault(
        round(at, 3), kind, draw.randrange(48), draw.randrange(48), round(lasts_s, 3), round(amount, 3)
    )


def shrunk(failing: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """The scenario without the faults that it does not need in order to fail, dropped one by one."""
    smallest = failing
    again = True
    while again:
        again = False
        for fault in smallest.faults:
            fewer = replace(smallest, faults=tuple(f for f in smallest.faults if f is not fault))
            if fails(fewer):
                smallest, again = fewer, True
                break
    return smallest
