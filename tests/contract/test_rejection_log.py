"""What the operator sees of a worker whose contributions are refused: the log, once per cause, and the status."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from diloco.comms.connect import connect
from diloco.coordinator.service import CoordinatorService
from diloco.worker.replica import Replica
from tests.contract.test_same_bits import settle
from tests.sim.hostile import LIES, LyingCodec
from tests.toy import ToyModel, config, plan_of


def test_a_refused_worker_is_logged_once_per_cause_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over gRPC: NaN in every contribution, then the quarantine; two lines in the log and all counts in the status."""
    c = config(topology={"workers": 1}, run={"inner_steps_total": 15})
    service = CoordinatorService(c, tmp_path, listen="127.0.0.1:0")
    with caplog.at_level(logging.WARNING, logger="diloco.coordinator.service"):
        connection = connect(f"127.0.0.1:{service.start()}")
        model = ToyModel(plan_of(c), 0)
        replica = Replica(plan_of(c), c, model, worker="w", nonce=1)
        replica.codecs = [LyingCodec(codec, LIES["nan"]) for codec in replica.codecs]
        settle(replica, connection, [])
        while replica.step < 15:
            model.train_step(replica.step + 1)
            settle(replica, connection, replica.after_step(10, time.monotonic()))
        (row,) = service.status()["members"]
        connection.close()
        service.close()
    assert (
        row["rejected"]["values"] == 5 and row["rejected"]["quarantined"] >= 3 and row["quarantined"] is True
    )
    lines = [r.getMessage() for r in caplog.records if r.name == "diloco.coordinator.service"]
    assert len(lines) == 2
    assert "worker w" in lines[0] and "NaN" in lines[0] and "quarantined" in lines[1]
