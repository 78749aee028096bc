"""Damaged inputs, from valid ones: nothing but the project's own errors comes out, and memory stays where it was.

What is damaged, and how, is in the modules beside this one; `python -m tests.fuzz` repeats any single input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.comms import convert
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.machine import COORDINATOR, Received
from diloco.errors import DilocoError
from tests.fuzz.machines import midway
from tests.fuzz.mutate import edited
from tests.fuzz.words import FROM_WORKER, REF, garbled
from tests.sim.faults import require_equal_ends, require_sound
from tests.toy import Cluster, config

ROOT = Path(__file__).resolve().parents[2]
GROWTH_MB = 64  # of a process, over tens of thousands of inputs


def campaign(count: int, jobs: int, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Results by target of a campaign in processes of its own, where memory is limited."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--jobs", str(jobs)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["target"]: row for row in map(json.loads, done.stdout.splitlines())}


def require_harmless(results: dict[str, dict[str, Any]]) -> None:
    for name, row in results.items():
        assert row["failed"] == 0, row
        if name != "all":
            assert 0.1 < row["refused"] / row["count"] < 0.99, f"{name}: most inputs take the same way: {row}"
            assert row["grown_mb"] < GROWTH_MB, row


def test_damaged_inputs_end_in_the_projects_own_errors() -> None:
    """A few thousand for each way in: frames, payloads, chunks, messages, journals, configurations, machines."""
    require_harmless(campaign(12_000, 1, 240))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_damaged_inputs_end_in_the_projects_own_errors() -> None:
    """The same, a hundred times as many."""
    results = campaign(1_000_000, 2, 3500)
    require_harmless(results)
    assert results["all"]["count"] >= 1_000_000
    print(json.dumps(results))


@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_a_damaged_message_is_refused_or_is_one(pick: int, rng: Any) -> None:
    """Hypothesis looks as well, and finds the smallest."""
    message = FROM_WORKER[pick % len(FROM_WORKER)]
    raw = garbled(rng, convert.worker_to_proto(message, REF if hasattr(message, "frame") else None))
    try:
        found = convert.worker_from_proto(convert.parse(pb.WorkerMessage, raw), b"frame")
    except DilocoError:
        return
    assert found.worker


def test_a_worker_out_of_its_mind_does_not_stop_the_others_rounds() -> None:
    """One of three sends damaged messages all the time, in its own name; the others' run has every commit, and ends alike."""
    rng = Random(5)
    c = config(run={"inner_steps_total": 60}, topology={"workers": 3}, robust={"kind": "norm_outlier"})
    cluster = Cluster(c, flavours=(0, 1, 1))
    honest, mad = cluster.workers[:2], cluster.workers[2]
    said = [0]

    def rave() -> None:
        for _ in range(20):
            message = FROM_WORKER[rng.randrange(len(FROM_WORKER) - 2)]  # neither Leave nor Vote
            proto = convert.worker_to_proto(message, REF if hasattr(message, "frame") else None)
            inner = getattr(proto, str(proto.WhichOneof("message")))
            inner.worker = mad.name
            if hasattr(inner, "incarnation"):
                inner.incarnation = cluster.coordinator.members[mad.name].incarnation
            try:
                found = convert.worker_from_proto(
                    convert.parse(pb.WorkerMessage, garbled(rng, proto)), edited(rng, b"frame" * 40)
                )
            except DilocoError:
                continue
            if found.worker == mad.name:
                said[0] += 1
                cluster.sim.deliver(COORDINATOR, Received(mad.name, found))
        if not all(worker.finished for worker in honest):
            cluster.sim.at(0.3, rave)

    cluster.sim.at(3.0, rave)
    cluster.sim.run(5000.0, lambda: all(worker.finished for worker in honest))
    assert said[0] > 500
    cluster.workers = honest
    require_sound(cluster)
    require_equal_ends(cluster)
    versions = cluster.coordinator.versions()
    assert all(version >= 60 // c.stream.H for version in versions)


def test_the_middle_of_a_run_is_one() -> None:
    """What the machines' targets start from: rounds have been committed, and more are to come."""
    coordinator = midway(config(topology={"workers": 3}), 8.5).coordinator
    assert coordinator.commits > 2 and not coordinator.complete
