"""A small model that takes its time: a step takes as long as a file says, and each is counted in another file.

Chaos names both files in its workers' environment. So a run lasts as long as its faults do on any machine, and work
that a killed worker had done is counted as well.
"""

from __future__ import annotations

import os
import time

from torch import Tensor

from diloco.worker.model import Transformer, preset_config

PACE = "DILOCO_CHAOS_PACE"  # path of a file with seconds per step
STEPS = "DILOCO_CHAOS_STEPS"  # path of a file that grows by a byte with each step
PRESET, SEQUENCE = "nano", 64


class Paced(Transformer):
    """The preset `PRESET`; training steps are at least the pace apart."""

    _last = 0.0

    def loss(self, tokens: Tensor) -> Tensor:
        if self.training:
            _count()
            wait = self._last + _pace_s() - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            self._last = time.monotonic()
        return super().loss(tokens)


def make() -> Paced:
    return Paced(preset_config(PRESET, SEQUENCE))


def _pace_s() -> float:
    try:
        with open(os.environ[PACE], encoding="ascii") as file:
            return float(file.read() or 0)
    except (KeyError, FileNotFoundError):
        return 0.0


def _count() -> None:
    path = os.environ.get(STEPS)
    if path is not None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, b".")  # in the kernel's hands: it outlives a kill -9
        finally:
            os.close(handle)
