"""Transfers without a network: whatever the cuts and the order, the object is whole and right, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.chunks import Chunk, crc32c
from diloco.comms.convert import worker_to_proto
from diloco.comms.messages import Commit, Contribution, Join, Snapshot
from diloco.comms.outbox import READ_S, Outbox
from diloco.comms.transfer import (
    MAX_AHEAD,
    FencedError,
    OutOfPlaceError,
    Receiving,
    Ref,
    TooLargeError,
    cut,
    ref_of,
)
from diloco.comms.uploads import QuotaError, Uploads
from diloco.errors import CorruptDataError

DATA = bytes(range(200))


def chunk(start: int, end: int) -> Chunk:
    return Chunk(start, crc32c(DATA[start:end]), DATA[start:end])


def receiving(ref: Ref | None = None) -> Receiving:
    target = Receiving(ref or ref_of("k", DATA), 1000)
    target.begin(1)
    return target


@given(st.binary(max_size=300), st.integers(1, 64), st.randoms(use_true_random=False))
def test_chunks_in_any_order_make_the_object(data: bytes, size: int, random: object) -> None:
    """`offset` never passes a gap, and ends at the length."""
    chunks = list(cut(data, 0, len(data), size))
    random.shuffle(chunks)  # type: ignore[attr-defined]
    target = Receiving(ref_of("k", data), 1000)
    target.begin(1)
    arrived: set[int] = set()
    for one in chunks:
        target.accept(1, one)
        arrived.update(range(one.offset, one.offset + len(one.data)))
        assert target.offset == next(i for i in range(len(data) + 1) if i not in arrived)
    assert target.finish(1) == data


@given(st.lists(st.integers(0, 12), max_size=6))
def test_an_attempt_that_breaks_anywhere_is_continued_at_the_offset(breaks: list[int]) -> None:
    """Each attempt sends what `begin` asks for and stops after some chunks; nothing is sent twice."""
    target = Receiving(ref_of("k", DATA), 1000)
    accepted = 0
    for generation, count in enumerate([*breaks, 1000], start=1):
        offset = target.begin(generation)
        for one in list(cut(DATA, offset, len(DATA), 16))[:count]:
            target.accept(generation, one)
            accepted += len(one.data)
    assert target.finish(target.generation) == DATA
    assert accepted == len(DATA)


def test_an_object_over_the_limit_is_refused_and_one_below_takes_no_memory_before_it_arrives() -> None:
    """2^60 bytes could not be allocated: the error would be MemoryError."""
    Receiving(Ref("k", 1 << 60, 0), 1 << 60)
    with pytest.raises(TooLargeError, match="1152921504606846976 bytes, the limit is 1000"):
        Receiving(Ref("k", 1 << 60, 0), 1000)


def test_an_older_generation_is_fenced_off() -> None:
    target = receiving()
    target.accept(1, chunk(0, 10))
    assert target.begin(3) == 10
    for act in (lambda: target.accept(1, chunk(10, 20)), lambda: target.finish(1), lambda: target.begin(3)):
        with pytest.raises(FencedError, match="is over"):
            act()
    assert target.offset == 10


@pytest.mark.parametrize("bad", [chunk(0, 10), chunk(5, 15), chunk(40, 45), chunk(30, 60)])
def test_a_chunk_that_overlaps_what_is_there_is_out_of_place(bad: Chunk) -> None:
    """Before the gap, across its edge, and inside what came ahead."""
    target = receiving()
    target.accept(1, chunk(0, 10))
    target.accept(1, chunk(40, 50))
    with pytest.raises(OutOfPlaceError, match="already there"):
        target.accept(1, bad)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Chunk(0, crc32c(DATA[:10]) ^ 1, DATA[:10]), "CRC32C of chunk"),
        (Chunk(195, crc32c(b"x" * 6), b"x" * 6), "beyond its 200 bytes"),
        (Chunk(2**64 - 1, crc32c(b"x"), b"x"), "beyond its 200 bytes"),
        (Chunk(0, 0, b""), "a chunk of 0 bytes"),
    ],
)
def test_a_wrong_chunk_is_refused_and_leaves_no_trace(bad: Chunk, why: str) -> None:
    target = receiving()
    with pytest.raises(CorruptDataError, match=why):
        target.accept(1, bad)
    assert target.offset == 0
    target.accept(1, chunk(0, 200))
    assert target.finish(1) == DATA


def test_chunks_beyond_a_gap_are_limited_in_number_and_the_gap_can_still_be_filled() -> None:
    data = bytes(2 * MAX_AHEAD + 4)
    target = Receiving(ref_of("k", data), len(data))
    target.begin(1)
    zero = crc32c(b"\0")
    for i in range(MAX_AHEAD):
        target.accept(1, Chunk(1 + i, zero, b"\0"))
    with pytest.raises(OutOfPlaceError, match="4096 chunks are beyond the gap at 0"):
        target.accept(1, Chunk(2 * MAX_AHEAD, zero, b"\0"))
    target.accept(1, Chunk(0, zero, b"\0"))
    assert target.offset == MAX_AHEAD + 1


def test_an_object_with_a_gap_is_not_finished() -> None:
    target = receiving()
    target.accept(1, chunk(100, 200))
    with pytest.raises(OutOfPlaceError, match="0 of 200 bytes"):
        target.finish(1)


def test_a_new_attempt_may_send_again_what_came_ahead_of_a_gap() -> None:
    target = receiving()
    target.accept(1, chunk(100, 200))
    assert target.begin(2) == 0
    for start in range(0, 200, 50):
        target.accept(2, chunk(start, start + 50))
    assert target.finish(2) == DATA


def test_a_whole_that_is_wrong_is_refused_and_starts_over() -> None:
    """Each chunk is fine, the announced CRC32C of the whole is another: the next attempt begins at 0."""
    target = receiving(Ref("k", 200, 12345))
    target.accept(1, chunk(0, 200))
    with pytest.raises(CorruptDataError, match="CRC32C of the whole"):
        target.finish(1)
    assert target.begin(2) == 0


GIFT = Contribution("ada", 1, 0, 1, DATA)


def announce(ref: Ref) -> pb.WorkerMessage:
    return worker_to_proto(GIFT, ref)


def test_a_finished_upload_is_delivered_once_and_again_only_when_begun_again() -> None:
    """A repeated commit gives nothing; a new upload of the same key gives the message again."""
    uploads = Uploads(1000, 1000, 4)
    for _ in range(2):
        offset, generation = uploads.begin("ada", announce(ref_of("k", DATA)))
        assert offset == 0
        uploads.find("ada", "k", generation).receiving.accept(generation, chunk(0, 200))
        assert uploads.commit("ada", "k", generation) == GIFT
        assert uploads.commit("ada", "k", generation) is None


def test_uploads_of_one_worker_are_not_anothers() -> None:
    uploads = Uploads(1000, 1000, 4)
    _, generation = uploads.begin("ada", announce(ref_of("k", DATA)))
    with pytest.raises(FencedError):
        uploads.find("bob", "k", generation)
    with pytest.raises(CorruptDataError, match="not from 'bob'"):
        uploads.begin("bob", announce(ref_of("k", DATA)))
    with pytest.raises(CorruptDataError, match="neither"):
        uploads.begin("ada", worker_to_proto(Join("ada", 1, "r", "", "")))


def test_uploads_with_a_stream_are_not_dropped_for_new_ones() -> None:
    """At the limit of two: an idle one gives way, two busy ones do not; dropped bytes can be used again."""
    uploads = Uploads(1000, 1000, 2)
    generations = {key: uploads.begin("ada", announce(Ref(key, 500, 0)))[1] for key in ("a", "b")}
    uploads.find("ada", "a", generations["a"]).streams = 1
    _, generations["c"] = uploads.begin("ada", announce(Ref("c", 500, 0)))
    with pytest.raises(FencedError):
        uploads.find("ada", "b", generations["b"])
    uploads.find("ada", "c", generations["c"]).streams = 1
    with pytest.raises(QuotaError, match="2 uploads under way"):
        uploads.begin("ada", announce(Ref("d", 1, 0)))
    uploads.drop("ada")
    assert uploads.begin("ada", announce(Ref("d", 1000, 0)))[0] == 0


def commit(version: int, frame: bytes) -> Commit:
    return Commit(3, version, ((0, 1.0),), ((0, version),), "d", ((0, frame), (5, frame)))


def test_the_outbox_holds_the_newest_two_versions_of_each_kind_and_fragment() -> None:
    """Whatever the order; other kinds and fragments do not count."""
    outbox = Outbox()
    for version in (1, 3, 2):
        outbox.put(commit(version, b"v%d" % version))
    outbox.put(Snapshot(3, 1, "d", ((0, b"s"),)))
    assert outbox.get("commit/3/1/0") is None
    assert outbox.get("commit/3/2/5") == b"v2" and outbox.get("commit/3/3/0") == b"v3"
    assert outbox.get("snapshot/3/1/0") == b"s"
    for nonsense in (
        "",
        "commit",
        "commit/3/3",
        "commit/3/3/9",
        "commit/x/3/0",
        "commit/3/3/0/0",
        "../3/3/0",
    ):
        assert outbox.get(nonsense) is None


def test_what_somebody_has_begun_to_read_outlives_newer_versions_for_a_while() -> None:
    """All frames of that version, as long as no minute passes between two reads; what nobody reads goes at once."""
    now = 0.0
    outbox = Outbox(clock=lambda: now)
    for version in (1, 2):
        outbox.put(commit(version, b"v%d" % version))
    assert outbox.get("commit/3/1/0") == b"v1"
    for version in (3, 4):
        outbox.put(commit(version, b"v%d" % version))
    now = READ_S - 1
    assert outbox.get("commit/3/1/5") == b"v1" and outbox.get("commit/3/2/0") is None
    now += READ_S - 1
    outbox.put(commit(5, b"v5"))
    assert outbox.get("commit/3/1/0") == b"v1"
    now += READ_S + 1
    outbox.put(Snapshot(9, 1, "d", ((0, b"s"),)))  # of another fragment: memory comes back all the same
    assert outbox.get("commit/3/1/0") is None and outbox.get("commit/3/4/0") == b"v4"


@given(events=st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.floats(0, 20)), max_size=60))
def test_the_outbox_holds_at_most_four_versions_whatever_is_read(
    events: list[tuple[int, bool, float]],
) -> None:
    """The newest two that were not forgotten, and two that are read: no reader makes it grow."""
    now = 0.0
    outbox = Outbox(clock=lambda: now)
    for version, reads, wait in events:
        now += wait
        if reads:
            outbox.get(f"commit/3/{version}/0")
        else:
            outbox.put(commit(version, b"%d" % version))
    assert sum(outbox.get(f"commit/3/{version}/0") is not None for version in range(1, 13)) <= 4


def test_the_outbox_describes_frames_and_takes_a_changed_one() -> None:
    """The same version with other bytes replaces what was offered."""
    outbox = Outbox()
    assert outbox.put(commit(1, b"old"))[0] == ref_of("commit/3/1/0", b"old")
    refs = outbox.put(commit(1, b"newer"))
    assert refs == (ref_of("commit/3/1/0", b"newer"), ref_of("commit/3/1/5", b"newer"))
    assert outbox.get("commit/3/1/0") == b"newer"
