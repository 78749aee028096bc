"""Promise 6 over real gRPC: the same run behind three emulated links and behind none ends with the same bits."""

from __future__ import annotations

from typing import Any

import pytest

from diloco.comms.link import Link
from tests.contract.test_same_bits import over_grpc
from tests.toy import Cluster, config

LINKS = {"none": None, "good": "64Mbit,10ms", "fair": "4Mbit,50ms", "poor": "1Mbit,100ms,jitter=40ms,loss=2%"}
RUNS: dict[str, dict[str, Any]] = {
    "overlapped": {"codec": {"down": "relay"}, "stream": {"tau": 1, "alpha": 0.5}},
    "blocking": {"codec": {"down": "q4_ef"}, "stream": {"overlap": "none", "layout": "single"}},
}


@pytest.mark.parametrize("run", RUNS)
def test_no_link_changes_a_bit(run: str) -> None:
    """Unlimited, 64 Mbit/s with 10 ms, 4 Mbit/s with 50 ms, 1 Mbit/s with 100 ms, jitter and loss: one digest, the simulator's."""
    sections = RUNS[run]
    c = config(
        stream={"H": 2, "frag_layers": 3, **sections["stream"]},
        codec={"up": "e3m0", **sections["codec"]},
        run={"inner_steps_total": 4},
        # Who takes part must not depend on how busy this machine is; what overtook another is soon sent again.
        fault={"quorum": 2, "heartbeat_s": 0.5, "suspect_s": 60.0, "dead_s": 120.0},
    )
    expected = Cluster(c).run().coordinator.global_digest()
    for name, text in LINKS.items():
        link = Link.parse(text) if text is not None else None
        assert over_grpc(c, link) == (expected, {0: expected, 1: expected}), name
