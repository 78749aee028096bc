"""A worker's record of its rounds, and the chart of it."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest

from diloco.worker import gantt, timeline
from diloco.worker.replica_slots import Flight, Slot
from diloco.worker.series import timelines
from diloco.worker.timeline import Recorder, Round, Span, Timeline, Total, dump, load


def flight(number: int, due: int) -> Flight:
    return Flight(number, 0, due, 0.0, 1, 1)


def record(rounds: int, fragments: int = 3, epoch: float = 1000.0, late: float = 0.0) -> Timeline:
    """A worker with a step a second, H 10 and tau 2: each reply comes 1.5 s after the sending, and `late` s more."""
    recorder = Recorder(0.0, epoch)
    slots = [Slot(i) for i in range(fragments)]
    for cycle in range(rounds):
        for i, slot in enumerate(slots):
            at = 10.0 * cycle + 3.0 * i + 3.0
            recorder.computed(at - 3.0, at, round(at))
            slot.flight = flight(cycle, round(at) + 2)
            recorder.follow(slots, round(at), at)
            if late:
                recorder.waited([i], at + 1.5, at + 1.5 + late)
            slot.flight.outcome = "merged-in"
            recorder.follow(slots, round(at) + 1, at + 1.5 + late)
            slot.flight = None
            recorder.follow(slots, round(at) + 2, at + 2.0 + late)
    return recorder.read()


def test_a_round_is_hidden_until_its_reply_is_waited_for() -> None:
    """From sending to reply 2.5 s, of which the trainer waited 1 s; then it waited for the merge's step."""
    found = record(1, 1, late=1.0)
    (entry,) = found.rounds
    assert (entry.sent, entry.answered, entry.merged) == (3.0, 5.5, 6.0)
    assert (entry.step, entry.due, entry.outcome, entry.final) == (3, 5, "merged-in", False)
    assert entry.exposed == 1.0 and entry.hidden == 1.5
    assert found.totals == {0: Total(1, 1.0, 1.5)} and found.kept_all


def test_a_new_round_closes_the_one_before_it_even_in_one_breath() -> None:
    """Where a boundary takes one round in and sends the next, no call lies between the two."""
    recorder, slot = Recorder(0.0, 0.0), Slot(0)
    slot.flight = flight(0, 10)
    recorder.follow([slot], 0, 1.0)
    slot.flight.outcome = "left-out"
    recorder.follow([slot], 9, 3.0)
    slot.flight = flight(1, 20)
    recorder.follow([slot], 10, 4.0)
    assert [(r.number, r.outcome, r.merged) for r in recorder.read().rounds] == [(0, "left-out", 4.0)]
    slot.flight = None
    recorder.follow([slot], 20, 9.0)
    last = recorder.read().rounds[-1]
    assert last.sent == 4.0 and math.isnan(last.answered) and last.hidden == 0.0


def test_only_replies_that_are_due_and_not_decoded_are_missing() -> None:
    """A wait counts for the rounds that it is for, and for no other that happens to be in flight."""
    due, later, here, decoding = (Slot(i) for i in range(4))
    due.flight, later.flight, here.flight, decoding.flight = (flight(0, n) for n in (5, 6, 5, 5))
    here.flight.outcome = decoding.flight.outcome = "merged-in"
    decoding.jobs = 1
    assert timeline.missing([due, later, here, decoding, Slot(4)], 5) == [0, 3]
    recorder = Recorder(0.0, 0.0)
    recorder.follow([due, later], 3, 0.0)
    recorder.waited([0, 9], 1.0, 3.0)
    due.flight = later.flight = None
    recorder.follow([due, later], 6, 4.0)
    assert {r.fragment: r.exposed for r in recorder.read().rounds} == {0: 2.0, 1: 0.0}


def test_memory_is_bounded_and_totals_are_not_cut() -> None:
    """A run of any length keeps the newest rounds and stretches only; sums go on over all."""
    found = record(1000)
    assert len(found.rounds) == timeline.ROUNDS and len(found.spans) <= timeline.SPANS
    assert found.rounds[-1].number == 999 and not found.kept_all
    assert found.totals[1].rounds == 1000 and found.totals[1].hidden == pytest.approx(1500)
    assert len(dump(found)) < 64 << 10


def test_steps_without_a_pause_are_one_stretch() -> None:
    """A millisecond between two steps cannot be seen, a wait can."""
    recorder = Recorder(10.0, 0.0)
    for begin, end, step in ((10.0, 11.0, 1), (11.001, 12.0, 2), (12.5, 13.0, 3)):
        recorder.computed(begin, end, step)
    spans = recorder.read().spans
    assert [(s.first, s.last) for s in spans] == [(1, 2), (3, 3)]
    assert spans[0].begin == 0.0 and spans[1].end == 3.0


def test_a_timeline_survives_the_wire() -> None:
    """To a tenth of a millisecond; what never happened stays unknown."""
    found = record(5, late=0.25)
    found.rounds[0].answered = math.nan
    again = load(dump(found))
    assert again is not None and dump(again) == dump(found)
    assert math.isnan(again.rounds[0].answered) and again.totals == found.totals


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"epoch":1}', "[" * 5000]
    + [
        json.dumps({"epoch": 1, "rounds": [row], "spans": [], "totals": {}, "kept_all": True})
        for row in (
            [], 7, "text", [0] * 11, [0, 0, 1, 2, None, 1, 2, 0, "merged-in", False],
            [0, 0, 1, 2, math.inf, 1, 2, 0, "merged-in", False], ["0", 0, 1, 2, 1, 1, 2, 0, "merged-in", False],
            [0, 0, 1, 2, 1, 1, 2, 0, "x" * 33, False], [0.5, 0, 1, 2, 1, 1, 2, 0, "merged-in", False],
            [0, 0, 10**400, 2, 1, 1, 2, 0, "merged-in", False], [0, 0, 1, 2, 1e308, 1, 2, 0, "merged-in", False],
            [0, 0, 1, 2, 1, 1, 2, None, "merged-in", False], [-1, 0, 1, 2, 1, 1, 2, 0, "merged-in", False],
            [0, 0, 1, 2, "1", 1, 2, 0, "merged-in", False], [0, 0, 1, 2, 10**400, 1, 2, 0, "merged-in", False],
        )
    ]
    + [
        json.dumps({"epoch": 1, "rounds": [], "spans": [], "totals": {}, "kept_all": True} | part)
        for part in (
            {"epoch": math.nan}, {"epoch": 1e308}, {"spans": [[0, 1, 1, 10**400]]}, {"spans": [[None, 1, 1, 1]]},
            {"totals": {"0": [1, math.nan, 0]}}, {"totals": {"0": [2**60, 1, 0]}}, {"totals": {"-1": [1, 1, 0]}},
        )
    ],
)  # fmt: skip
def test_what_is_no_timeline_is_dropped(text: str) -> None:
    """It comes from another machine: nothing in it may break the report."""
    assert load(text) is None


def test_the_last_life_is_drawn_and_all_lives_are_counted() -> None:
    """A worker that came back says goodbye twice; rows without a timeline and with a broken one are passed over."""
    rows: list[dict[str, object]] = [
        {"worker": "a", "timeline": dump(record(2))},
        {"worker": "a", "loss": 1.0},
        {"worker": "a", "timeline": "broken"},
        {"worker": "a", "timeline": dump(record(3, epoch=5000.0))},
    ]
    found = timelines(rows)
    assert found["a"].epoch == 5000.0 and found["a"].totals[0].rounds == 5


def elements(drawing: str) -> list[ElementTree.Element]:
    """Every element of the drawing, which must be well-formed."""
    return list(ElementTree.fromstring(drawing[drawing.index("<svg") :]).iter())


def test_every_fragment_of_every_worker_has_a_lane_with_its_rounds() -> None:
    """Hidden and exposed parts are bars in the fragment's lane, computing is a lane of its own."""
    drawing, caption = gantt.gantt({"a": record(4, late=1.0), "b": record(4)})
    assert caption == "Drawn: every round."
    for lane in ("compute", "fragment 0", "fragment 1", "fragment 2"):
        assert len(re.findall(rf'class="name"[^>]*>{lane}<', drawing)) == 2
    kinds = [e.get("class") for e in elements(drawing) if e.tag == "rect"]
    assert kinds.count("hidden bar") == 24 and kinds.count("exposed") == 12
    assert "exposed 1.0 s, merged-in" in drawing and "compute" in kinds


def test_bars_are_as_long_as_the_times_they_stand_for() -> None:
    """The exposed second of a worker is two thirds of the second and a half that was hidden."""
    drawing, _ = gantt.gantt({"a": record(3, 1, late=1.0)})
    widths = {str(e.get("class")): float(str(e.get("width"))) for e in elements(drawing) if e.tag == "rect"}
    assert widths["exposed"] / widths["hidden bar"] == pytest.approx(1 / 1.5, rel=0.02)


def test_a_thousand_rounds_stay_readable() -> None:
    """The newest rounds are drawn, the caption says so, and nothing leaves the drawing."""
    drawing, caption = gantt.gantt({name: record(1000) for name in "ab"})
    drawn = re.fullmatch(r"Drawn: the last (\d+) of up to 1000 rounds of each fragment\.", caption)
    assert drawn is not None and 10 <= int(drawn[1]) <= 12
    found = elements(drawing)
    assert len(found) < 600 and "step 9" in drawing
    edges = [float(str(e.get("x"))) + float(str(e.get("width"))) for e in found if e.tag == "rect"]
    assert max(edges) <= 1080 - gantt.RIGHT + 0.2


def test_many_workers_and_fragments_are_cut_with_a_word() -> None:
    """A page has room for some lanes; what is left out is named."""
    _, caption = gantt.gantt({f"w{i}": record(1, 5) for i in range(30)})
    assert "The first 8 of 30 workers." in caption
    _, caption = gantt.gantt({"a": record(1, 60)})
    assert "Fragments 0 to 46 of 60." in caption


def test_a_long_final_exchange_does_not_squeeze_the_rounds() -> None:
    """A worker that waits at the end for a slower one would else be all that can be seen."""
    found = record(3, 1)
    found.rounds = [
        *found.rounds,
        Round(0, 3, 30, 30, 30.0, 9000.0, 9000.0, 8970.0, "merged-in", True),
    ]
    drawing, _ = gantt.gantt({"a": found})
    hidden = [e for e in elements(drawing) if e.get("class") == "hidden bar"]
    assert len(hidden) == 3 and min(float(str(e.get("width"))) for e in hidden) > 30


def test_clocks_of_two_hosts_share_one_axis() -> None:
    """A worker that began 5 s later has its bars 5 s further right."""
    drawing, caption = gantt.gantt({"a": record(4, 1), "b": record(4, 1, epoch=1005.0)})
    xs = [float(str(e.get("x"))) for e in elements(drawing) if e.get("class") == "hidden bar"]
    assert len(xs) == 8 and caption == "Drawn: every round."
    per_second = (xs[1] - xs[0]) / 10
    assert xs[4] - xs[0] == pytest.approx(5 * per_second, abs=0.2)


def test_rounds_that_did_not_count_look_different() -> None:
    """And the legend says what that means, only where there are any."""
    found = record(2, 1)
    assert "did not count" not in gantt.gantt({"a": found})[0]
    found.rounds[1].outcome = "aborted"
    drawing, _ = gantt.gantt({"a": found})
    assert "did not count" in drawing and "hidden bar lost" in drawing


def test_names_are_escaped_and_no_rounds_are_no_failure() -> None:
    """Worker names come from other people; a worker without rounds is no reason to fail."""
    assert "<b>" not in gantt.gantt({"<b>": record(1)})[0]
    empty = Timeline(0.0, [], [Span(0.0, 1.0, 1, 1)])
    assert "No worker left a record" in gantt.gantt({"a": empty})[0]
    assert gantt.gantt({})[1] == ""


def test_numbers_at_the_edge_of_what_is_taken_can_be_drawn() -> None:
    """Times decades apart, rounds that took no time, counts up to 2^53: a drawing all the same, and well-formed."""
    for times, epoch in (
        ((0.5, 0.5, 0.5, 0.0), 0.0),
        ((-9e8, 9e8, 9e8, 9e8), 9e9),
        ((9e8, -9e8, -9e8, -1.0), -9e9),
    ):
        row = [0, 2**53, 2**53, 2**53, *times, "merged-in", False]
        found = load(
            json.dumps(
                {
                    "epoch": epoch,
                    "rounds": [row],
                    "spans": [[*times[:2], 2**53, 2**53]],
                    "totals": {"0": [2**53, times[1], times[3]]},
                    "kept_all": True,
                }
            )
        )
        assert found is not None
        for drawn in ({"a": found}, {"a": found, "b": record(3)}):
            assert elements(gantt.gantt(drawn)[0])
