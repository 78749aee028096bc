"""Optimizers for one node: any of them can be the inner optimizer of a distributed run.

Each algorithm is one module. Outer optimizers that act on fragments are in `diloco.outer`.
"""

from __future__ import annotations

from diloco.optim.adamp import AdamP
from diloco.optim.build import build_optimizer
from diloco.optim.combine import Combined
from diloco.optim.gpa import GPA
from diloco.optim.groups import param_groups
from diloco.optim.hyperball import Hyperball
from diloco.optim.mars import MARS
from diloco.optim.md import MD
from diloco.optim.muon import Muon
from diloco.optim.normuon import NorMuon
from diloco.optim.orthogonalize import orthogonalize
from diloco.optim.scion import Scion
from diloco.optim.snoo import SNOO

__all__ = [
    "GPA",
    "MARS",
    "MD",
    "SNOO",
    "AdamP",
    "Combined",
    "Hyperball",
    "Muon",
    "NorMuon",
    "Scion",
    "build_optimizer",
    "orthogonalize",
    "param_groups",
]
