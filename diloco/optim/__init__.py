"""Optimizers for one node: any of them can be the inner optimizer of a distributed run.

Each algorithm is one module. Outer optimizers that act on fragments are in `diloco.outer`.
"""

from __future__ import annotations

from diloco.optim.adamp import AdamP
from diloco.optim.adamw import AdamW
from diloco.optim.anytime import AnytimeAverage
from diloco.optim.build import build_optimizer
from diloco.optim.combine import Combined
from diloco.optim.freon import Freon
from diloco.optim.gpa import GPA
from diloco.optim.groups import param_groups
from diloco.optim.hyperball import Hyperball
from diloco.optim.kaon import Kaon
from diloco.optim.mars import MARS
from diloco.optim.master import Master
from diloco.optim.md import MD
from diloco.optim.muon import Muon
from diloco.optim.muown import Muown
from diloco.optim.normuon import NorMuon
from diloco.optim.orthogonalize import orthogonalize
from diloco.optim.schedule_free import ScheduleFreeAdamW
from diloco.optim.schedule_free_plus import ScheduleFreePlus
from diloco.optim.scion import Scion
from diloco.optim.snoo import SNOO
from diloco.optim.weight_norm import RowNorm

__all__ = [
    "GPA",
    "MARS",
    "MD",
    "SNOO",
    "AdamP",
    "AdamW",
    "AnytimeAverage",
    "Combined",
    "Freon",
    "Hyperball",
    "Kaon",
    "Master",
    "Muon",
    "Muown",
    "NorMuon",
    "RowNorm",
    "ScheduleFreeAdamW",
    "ScheduleFreePlus",
    "Scion",
    "build_optimizer",
    "orthogonalize",
    "param_groups",
]
