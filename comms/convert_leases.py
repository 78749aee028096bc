"""What is said about leases of data, to and from protobuf. Pure.

What comes from the network is checked as in `diloco.comms.convert`; whose the blocks are is for the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterable

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.checked import listed, word
from diloco.comms.messages import Lease, LeaseRequest
from diloco.errors import CorruptDataError
from diloco.ranges import MAX_RANGES, Ranges

# A worker's blocks are in at most MAX_RANGES pieces. What it names of them it has in an order of its own, so in more.
MOST_NAMED = 4 * MAX_RANGES


def ranges_to(ranges: Ranges) -> list[pb.BlockRange]:
    return [pb.BlockRange(shard=shard, lo=lo, hi=hi) for shard, lo, hi in ranges]


def ranges_from(name: str, proto: Iterable[pb.BlockRange]) -> Ranges:
    found = listed(name, proto)
    if len(found) > MOST_NAMED:
        raise CorruptDataError(f"{name}: {len(found)} ranges, at most {MOST_NAMED} are allowed")
    return tuple((r.shard, r.lo, r.hi) for r in found)


def request_to(message: LeaseRequest) -> pb.WorkerMessage:
    return pb.WorkerMessage(
        lease_request=pb.LeaseRequest(
            worker=message.worker,
            incarnation=message.incarnation,
            number=message.number,
            want=message.want,
            kept=ranges_to(message.kept),
            sizes=message.sizes,
        )
    )


def request_from(proto: pb.LeaseRequest) -> LeaseRequest:
    return LeaseRequest(
        worker=word("LeaseRequest.worker", proto.worker),
        incarnation=proto.incarnation,
        number=proto.number,
        want=proto.want,
        kept=ranges_from("LeaseRequest.kept", proto.kept),
        sizes=listed("LeaseRequest.sizes", proto.sizes),
    )


def lease_to(message: Lease) -> pb.CoordinatorMessage:
    return pb.CoordinatorMessage(
        lease=pb.Lease(
            incarnation=message.incarnation,
            number=message.number,
            serial=message.serial,
            ranges=ranges_to(message.ranges),
        )
    )


def lease_from(proto: pb.Lease) -> Lease:
    return Lease(proto.incarnation, proto.number, proto.serial, ranges_from("Lease.ranges", proto.ranges))
