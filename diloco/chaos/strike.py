"""One fault, begun and ended: which handle of the cluster each kind turns. When is in `schedule`."""

from __future__ import annotations

import signal

from diloco.chaos.cluster import CAN_FILL, Cluster
from diloco.chaos.schedule import COORDINATOR, OF_LIARS, Fault


def begin(cluster: Cluster, fault: Fault) -> str:
    """Do it; returns what there is to say about it, "" for nothing."""
    wire = cluster.wires.get(fault.target)
    match fault.kind:
        case "kill" | "coordinator_kill":
            cluster.kill(fault.target, fault.for_s)
        case "stop":
            cluster.signal(fault.target, signal.SIGSTOP)
        case "disk_full":
            if not CAN_FILL:
                return "not possible on this system"
            cluster.fill(True)
        case kind if kind in OF_LIARS:
            cluster.liar(fault.target, kind)
        case kind:
            assert wire is not None
            if kind == "partition":
                wire.cut(True)
            elif kind == "slow":
                wire.slow(True)
            elif kind == "corrupt":
                wire.damage(True)
            else:
                return f"{wire.replay():,} bytes said again"
    return ""


def end(cluster: Cluster, fault: Fault) -> str:
    """Let it be over; returns what there is to say about it, "" for nothing."""
    wire = cluster.wires.get(fault.target)
    match fault.kind:
        case "stop":
            cluster.signal(fault.target, signal.SIGCONT)
        case "disk_full" if CAN_FILL:
            hit = cluster.children[COORDINATOR].popen.poll() is not None
            cluster.fill(False)
            return "the coordinator ended and was started again" if hit else "nothing had to be written"
        case kind if kind in OF_LIARS:
            cluster.remove(fault.target)
        case "partition" | "slow" | "corrupt":
            assert wire is not None
            wire.cut(False)
            wire.slow(False)
            wire.damage(False)
            return f"{wire.damaged} bits changed so far" if fault.kind == "corrupt" else ""
    return ""
