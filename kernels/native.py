"""The compiled kernels: finding the library, its one structure and its one call.

The library is built with the package (`setup.py`) from `csrc/diloco_kernels.cpp`. Where no compiler was at hand the
torch reference computes the same bits, slower; that is logged once. `DILOCO_KERNELS=reference` asks for it on purpose.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# Below this many values a second thread costs more than it brings.
PER_THREAD = 1 << 18

_I32, _I64, _F32, _F64, _P = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
    ctypes.c_void_p,
)
_log = logging.getLogger(__name__)


class Op(enum.IntEnum):
    ENCODE = 0
    ACCUMULATE = 1
    NORMS = 2
    TRIMMED = 3
    MERGE = 4
    STEP = 5
    CHECK = 6
    STAT_SUM = 7
    STAT_CODES = 8
    TOPK_SELECT = 9
    CORRECT = 10
    SWAP_LERP = 11


class Job(ctypes.Structure):
    """The C++ structure of the same name, field by field."""

    _fields_ = [
        *((name, _I32) for name in ("codec", "rule", "bits", "k", "random", "trim", "dtype", "flag")),
        *((name, _I64) for name in ("n", "block", "workers", "codes_at", "table_at", "shift_at")),
        *((name, _P) for name in ("x", "local", "error", "residual", "payload", "sums", "payloads")),
        *((name, _P) for name in ("weights", "center", "edges", "mean", "params", "first", "second")),
        *((name, _P) for name in ("out", "counts")),
        ("mean64", _F64),
        ("width", _F64),
        ("seed", ctypes.c_uint64),
        *(
            (name, _F32)
            for name in ("beta", "lr", "mu", "mu_rest", "mu_y", "mu_y_rest", "alpha", "alpha_rest")
        ),
        ("bad", _I32),
    ]
    keep: object  # Python objects whose memory the pointers point to


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is none of this version."""
    if os.environ.get("DILOCO_KERNELS") == "reference":
        return None
    here = Path(__file__).parent
    found = [here / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    for path in found:
        if path.exists():
            try:
                library = ctypes.CDLL(os.fspath(path))
                library.diloco_run.argtypes = [ctypes.c_int, ctypes.POINTER(Job), _I64, ctypes.c_int]
                library.diloco_job_size.restype = _I64
                fits = library.diloco_job_size() == ctypes.sizeof(Job)
            except (OSError, AttributeError) as error:
                _log.warning("compiled kernels do not load (%s): the torch reference is used, slower", error)
                return None
            if fits:
                return library
            _log.warning(
                "compiled kernels are of another version: run `pip install -e .` again; torch is used"
            )
            return None
    _log.warning(
        "no compiled kernels (no C++ compiler at install time?): the torch reference is used, slower"
    )
    return None


@cache
def level() -> int:
    """The best instruction set compiled in and usable here: 0 baseline, 1 x86-64-v3, 2 x86-64-v4."""
    found = library()
    return 0 if found is None else int(found.diloco_level())


def run(op: Op, job: Job) -> bool:
    """Run `op`; True if the input was not finite (ENCODE, STEP) or a received code is no number (CHECK)."""
    found = library()
    assert found is not None
    threads = min(torch.get_num_threads(), -(-job.n // PER_THREAD))
    return bool(found.diloco_run(op, ctypes.byref(job), threads, level()))
