"""One billion fp32 parameters through a whole round over gRPC: encode, upload, aggregate, commit, download.

Random tensors, no training. The coordinator is a process of its own, as in a real run; what is reported is its
peak resident memory as a multiple of the model's fp32 size, and the goodput beside a plain copy in memory.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from diloco.comms.connect import connect
from diloco.comms.machine import Compute, Computed, Connection, Send
from diloco.config import RunConfig
from diloco.fragments import FragmentPlan, build_plan
from diloco.worker.replica import Replica


class RandomParameters:
    """A model that is never held: fragment values are drawn when they are read."""

    def __init__(self, plan: FragmentPlan) -> None:
        self.plan, self.step, self.merged = plan, 0, 0

    def read(self, fragment: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.step + fragment)
        return torch.randn(self.plan.fragments[fragment].numel, generator=generator)

    def write(self, fragment: int, values: Tensor) -> None:
        self.merged += values.numel()


def settle(replica: Replica, connection: Connection, actions: list[object]) -> None:
    """Perform actions and wait, all on one thread, until nothing holds the replica."""
    pending = list(actions)
    while pending or replica.blocked:
        while pending:
            action = pending.pop(0)
            if isinstance(action, Send):
                connection.send(action.message)
            elif isinstance(action, Compute):
                pending = [*replica.handle(Computed(action.job()), time.monotonic()), *pending]
        event = connection.receive(0.5)
        if event is not None:
            pending += replica.handle(event, time.monotonic())
    replica.merge()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--fragments", type=int, default=16)
    parser.add_argument("--up", default="fp32")
    parser.add_argument("--down", default="g_fp32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/billion.json"))
    a = parser.parse_args()
    each = int(a.parameters) // a.fragments
    shapes = {f"blocks.{i}.w": (each,) for i in range(a.fragments)}
    text = f"""
        [run]
        run_id = "billion"
        inner_steps_total = {a.fragments}
        [stream]
        H = {a.fragments}
        tau = 0
        alpha = 0.0
        frag_layers = 1
        [codec]
        up = "{a.up}"
        down = "{a.down}"
        [topology]
        workers = 1
        [fault]
        suspect_s = 300.0
        dead_s = 600.0
    """
    model_bytes = 4 * each * a.fragments
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.toml").write_text(text)
        command = [sys.executable, "-m", "diloco", "coordinator", "run.toml", "--listen", "127.0.0.1:0"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            found = None
            while found is None:
                line = server.stdout.readline()
                assert line, "the coordinator ended"
                found = re.search(r"listening on port (\d+)", line)
            config = RunConfig.from_toml(text)
            connection = connect(f"127.0.0.1:{found.group(1)}")
            plan = build_plan(shapes, a.fragments, frag_layers=1)
            parameters = RandomParameters(plan)
            replica = Replica(plan, config, parameters, worker="w0", nonce=1)
            begun = time.monotonic()
            settle(replica, connection, [])
            joined = time.monotonic()
            for step in range(1, a.fragments + 1):  # one fragment's turn after each
                parameters.step = step
                settle(replica, connection, list(replica.after_step(1, time.monotonic())))
            done = time.monotonic()
            peak = peak_bytes(server.pid)
            up, down = connection.traffic()
            connection.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    assert replica.versions() == (1,) * len(plan.fragments)
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    copy_begun = time.monotonic()
    target.copy_(source)
    copy_rate = 4 * (1 << 26) / (time.monotonic() - copy_begun)
    result = {
        "parameters": each * a.fragments,
        "up": a.up,
        "down": a.down,
        "coordinator_peak_over_model": peak / model_bytes,
        "seed_seconds": joined - begun,
        "round_seconds": done - joined,
        "round_goodput_over_memcpy": (up + down - model_bytes) / (done - joined) / copy_rate,
        "bytes_up": up,
        "bytes_down": down,
    }
    for name, value in result.items():
        print(f"{name:28s} {value:.3f}" if isinstance(value, float) else f"{name:28s} {value}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1))


def peak_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
