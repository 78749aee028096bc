"""The coordinator's open uploads: who may have how many, which attempt is current, what is complete. No I/O."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.convert import worker_from_proto, worker_ref
from diloco.comms.messages import FromWorker
from diloco.comms.transfer import FencedError, Receiving, Ref
from diloco.errors import CorruptDataError, TransportError

REMEMBERED = 4096  # generations of finished uploads, so that a repeated commit delivers nothing twice


class QuotaError(TransportError):
    """Too much is on its way in already: try again later."""


@dataclass(slots=True)
class Upload:
    receiving: Receiving
    message: pb.WorkerMessage
    streams: int = 0  # how many feed it right now


class Uploads:
    """Bounds: bytes per object, bytes of all open objects together, open objects per worker.

    When all bytes are taken, whoever holds most of them gives way to one that asks for less. `object_limit` is asked
    at each `begin` for a lower bound of an object than `max_object_bytes`; None when it does not know one.
    """

    def __init__(
        self,
        max_object_bytes: int,
        max_total_bytes: int,
        max_per_worker: int,
        object_limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._max_object_bytes = max_object_bytes
        self._object_limit = object_limit
        self._max_total_bytes = max_total_bytes
        self._max_per_worker = max_per_worker
        self._open: dict[str, dict[str, Upload]] = {}  # worker -> key
        self._finished: OrderedDict[tuple[str, str, int], None] = OrderedDict()
        self._generations = itertools.count(1)

    def begin(self, worker: str, message: pb.WorkerMessage) -> tuple[int, int]:
        """(offset, generation) with which to go on. Raises TooLargeError, QuotaError, CorruptDataError."""
        ref = worker_ref(message)
        if ref is None:
            raise CorruptDataError("BeginUpload: the message is neither a Contribution nor an Initial")
        if worker_from_proto(message, b"").worker != worker:
            raise CorruptDataError(f"BeginUpload: the message is not from {worker!r}, whose session this is")
        mine = self._open.setdefault(worker, {})
        upload = mine.get(ref.key)
        if upload is None or upload.receiving.ref != ref:
            mine.pop(ref.key, None)
            upload = mine[ref.key] = self._admit(worker, mine, ref, message)
        generation = next(self._generations)
        return upload.receiving.begin(generation), generation

    def find(self, worker: str, key: str, generation: int) -> Upload:
        """The open upload that `generation` may feed; FencedError when there is none."""
        upload = self._open.get(worker, {}).get(key)
        if upload is None or upload.receiving.generation != generation:
            raise FencedError(f"upload {key!r}: generation {generation} is not under way; begin again")
        return upload

    def commit(self, worker: str, key: str, generation: int) -> FromWorker | None:
        """The message with its frame, once; None when this generation was delivered before.

        Raises FencedError, OutOfPlaceError, CorruptDataError.
        """
        finished = (worker, key, generation)
        if finished in self._finished:
            return None
        upload = self.find(worker, key, generation)
        message = worker_from_proto(upload.message, upload.receiving.finish(generation))
        del self._open[worker][key]
        self._finished[finished] = None
        if len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)
        return message

    def drop(self, worker: str) -> None:
        """Forget what `worker` has open."""
        self._open.pop(worker, None)

    def _admit(self, worker: str, mine: dict[str, Upload], ref: Ref, message: pb.WorkerMessage) -> Upload:
        if len(mine) >= self._max_per_worker:
            idle = next((key for key, upload in mine.items() if not upload.streams), None)
            if idle is None:
                raise QuotaError(f"worker {worker!r} has {len(mine)} uploads under way, the limit")
            del mine[idle]  # given up by its sender
        limit = self._max_object_bytes
        if (known := self._object_limit()) is not None:
            limit = min(limit, known)
        receiving = Receiving(ref, limit)
        self._make_room(worker, ref.length)
        return Upload(receiving, message)

    def _make_room(self, worker: str, length: int) -> None:
        while (held := sum(map(_announced, self._open.values()))) + length > self._max_total_bytes:
            greediest = max(self._open, key=lambda name: _announced(self._open[name]))
            theirs = self._open[greediest]
            if _announced(theirs) <= _announced(self._open[worker]) + length:
                raise QuotaError(
                    f"{held} bytes of uploads are under way, {length} more would exceed {self._max_total_bytes}"
                )
            key = max(theirs, key=lambda key: (not theirs[key].streams, theirs[key].receiving.ref.length))
            theirs.pop(key).receiving.begin(next(self._generations))  # fences off the streams that feed it


def _announced(uploads: dict[str, Upload]) -> int:
    return sum(upload.receiving.ref.length for upload in uploads.values())
