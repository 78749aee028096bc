"""The partition of a model into fragments and the schedule of their turns."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diloco.errors import ConfigError
from diloco.fragments import FragmentPlan, block_of, build_plan, gather, scatter

LAYOUTS = ("strided", "sequential", "balanced", "single")
SHAPES = {"embed": (4, 3), "blocks.0.w": (2, 2), "blocks.1.w": (2, 3), "blocks.2.w": (5,), "norm": (3,)}

names = st.sampled_from(["embed", "head", "norm", *(f"blocks.{i}.{w}" for i in range(7) for w in ("w", "b"))])
shapes = st.dictionaries(
    names, st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple), min_size=1, max_size=12
)


def layers(count: int) -> dict[str, tuple[int, ...]]:
    return {"embed": (4, 2), **{f"blocks.{i}.w": (2, 2) for i in range(count)}, "head": (2, 4)}


@given(shapes, st.sampled_from(LAYOUTS), st.integers(1, 4), st.integers(1, 40))
def test_every_element_lies_in_exactly_one_fragment(
    drawn: dict[str, tuple[int, ...]], layout: str, frag_layers: int, H: int
) -> None:
    """Writing each fragment's own number through `scatter` touches every element once; gathering gives it back."""
    plan = build_plan(drawn, H, layout=layout, frag_layers=frag_layers)
    tensors = {name: torch.zeros(shape) for name, shape in drawn.items()}
    for fragment in plan.fragments:
        before = gather(fragment, tensors)
        assert not before.any(), "an element belongs to two fragments"
        scatter(fragment, torch.full((fragment.numel,), float(fragment.index + 1)), tensors)
    assert all(bool((t > 0).all()) for t in tensors.values()), "an element belongs to no fragment"
    assert plan.numel == sum(t.numel() for t in tensors.values())
    assert all(f.numel > 0 and 0 <= f.first_step < H for f in plan.fragments)


@given(shapes, st.sampled_from(LAYOUTS), st.integers(1, 40), st.sampled_from(["short", "full"]))
def test_a_description_gives_the_same_plan_back(
    drawn: dict[str, tuple[int, ...]], layout: str, H: int, first_round: str
) -> None:
    """`from_description` inverts `describe`, so digests agree."""
    plan = build_plan(drawn, H, layout=layout, first_round=first_round)
    again = FragmentPlan.from_description(plan.describe())
    assert again == plan
    assert again.digest() == plan.digest()


@given(shapes, st.integers(1, 50), st.integers(0, 300))
def test_a_fragment_sends_once_in_every_h_steps(
    drawn: dict[str, tuple[int, ...]], H: int, start: int
) -> None:
    """In any window of H steps after the first turn each fragment is due exactly once, with rounds counting up."""
    plan = build_plan(drawn, H, frag_layers=1)
    window = range(start + H, start + 2 * H)
    turns = [p for step in window for p in plan.due(step)]
    assert sorted(turns) == [f.index for f in plan.fragments]
    for p in turns:
        steps = [s for s in range(1, start + 3 * H) if p in plan.due(s)]
        rounds = [plan.round_of(p, s) for s in steps]
        assert rounds == list(range(rounds[0], rounds[0] + len(rounds)))
        assert plan.flush_round(p, steps[-1]) == rounds[-1] + 1


@pytest.mark.parametrize(
    ("H", "blocks", "expected"),
    [
        (30, 2, [0, 10, 20]),
        (100, 8, [0, 11, 22, 33, 44, 55, 66, 77, 88]),
        (100, 16, [5 * p for p in range(17)]),
        (100, 36, [2 * p for p in range(37)]),
    ],
)
def test_offsets_are_the_golden_ones(H: int, blocks: int, expected: list[int]) -> None:
    """Section 11: gaps 10, 11, 5 and 2 for 3, 9, 17 and 37 fragments."""
    plan = build_plan(layers(blocks), H, frag_layers=1)
    assert [f.first_step for f in plan.fragments] == expected


def test_the_golden_schedule_of_three_fragments() -> None:
    """H=30, P=3: p0 at 30, 60; p1 at 10, 40; p2 at 20, 50; nothing else."""
    plan = build_plan(layers(2), 30, frag_layers=1)
    sends = [(step, p) for step in range(62) for p in plan.due(step)]
    assert sends == [(10, 1), (20, 2), (30, 0), (40, 1), (50, 2), (60, 0)]


def test_a_full_first_round_skips_the_short_one() -> None:
    """first_round = full: fragments with an offset send first after their offset plus H."""
    plan = build_plan(layers(2), 30, frag_layers=1, first_round="full")
    sends = [(step, p) for step in range(62) for p in plan.due(step)]
    assert sends == [(30, 0), (40, 1), (50, 2), (60, 0)]


def test_more_fragments_than_steps_share_steps() -> None:
    """P > H is legal: every fragment still has one turn in H steps."""
    plan = build_plan(layers(9), 3, frag_layers=1)
    assert [f.first_step for f in plan.fragments] == [p % 3 for p in range(10)]


def test_blocks_are_dealt_out_or_kept_together() -> None:
    """Strided deals blocks like cards, sequential keeps neighbours; what is outside the blocks comes last."""
    shapes = layers(6)

    def blocks(layout: str) -> list[list[int | None]]:
        plan = build_plan(shapes, 30, layout=layout, frag_layers=3)
        return [[block_of(s.name) for s in f.spans] for f in plan.fragments]

    assert blocks("strided") == [[0, 2, 4], [1, 3, 5], [None, None]]
    assert blocks("sequential") == [[0, 1, 2], [3, 4, 5], [None, None]]
    assert len(blocks("single")) == 1


def test_balanced_packing_stays_near_the_mean() -> None:
    """Largest first into the lightest bin: no bin above 4/3 of the best possible."""
    shapes = {f"blocks.{i}.w": (1 + i * 7 % 11, 5) for i in range(12)}
    plan = build_plan(shapes, 30, layout="balanced", frag_layers=3)
    best = max(plan.numel / len(plan.fragments), 5 * 11)
    assert max(f.numel for f in plan.fragments) <= 4 / 3 * best


def test_scatter_keeps_dtype_and_is_undone_by_gather() -> None:
    """Values go into the tensors' own dtype; gathering returns fp32."""
    plan = build_plan(SHAPES, 10, frag_layers=1)
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in SHAPES.items()}
    values = torch.arange(plan.fragments[0].numel, dtype=torch.float32)
    scatter(plan.fragments[0], values, tensors)
    assert tensors["blocks.0.w"].dtype == torch.bfloat16
    assert torch.equal(gather(plan.fragments[0], tensors), values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm": None}, "tensor 'norm' of the run is missing"),
        ({"norm": (4,)}, "'norm' has shape [4] in the worker's model and [3] in the run"),
        ({"extra": (2,)}, "tensor 'extra' of the worker's model does not exist"),
    ],
)
def test_the_difference_of_two_plans_is_said_in_words(
    change: dict[str, tuple[int, ...] | None], said: str
) -> None:
    """The first missing, reshaped or additional tensor is named."""
    theirs = {n: s for n, s in {**SHAPES, **change}.items() if s is not None}
    assert said in build_plan(SHAPES, 30).difference(build_plan(theirs, 30))


def test_the_difference_of_two_schedules_is_said_in_words() -> None:
    """Same tensors, other cut: the number of fragments, or the settings to compare, are named."""
    ours = build_plan(SHAPES, 30, frag_layers=1)
    assert "fragments" in ours.difference(build_plan(SHAPES, 30, layout="single"))
    assert "[stream]" in ours.difference(build_plan(SHAPES, 31, frag_layers=1))


def _damaged() -> list[str]:
    good = json.loads(build_plan(SHAPES, 30).describe())

    def but(**changes: object) -> str:
        return json.dumps({**good, **changes})

    def spans(*parts: list[object]) -> str:
        return but(fragments=[{"first_step": 0, "spans": list(parts)}])

    return [
        "", "null", "[]", "{}", "7", '"x"', "{", "[" * 100_000, "\x00",
        but(H=0), but(H="x"), but(H=float("inf")), but(first_round="never"), but(fragments=[]), but(fragments=3),
        but(fragments=[{}]), but(fragments=[{"first_step": 0, "spans": []}]),
        but(fragments=[{"first_step": 30, "spans": [["a", [2], 0, 2]]}]),
        spans(["a", [2], 0, 3]), spans(["a", [2], -1, 2]), spans(["a", [-2, -2], 0, 4]), spans(["a", [3], 0, 2]),
        spans(["a", [2], 0, 2], ["a", [2], 0, 2]), spans(["a", [4], 0, 2], ["a", [2, 2], 2, 4]), spans(["a", [2]]),
    ]  # fmt: skip


@pytest.mark.parametrize("text", _damaged(), ids=lambda t: t[:40].replace("\x00", "NUL"))
def test_what_is_not_a_whole_plan_is_refused(text: str) -> None:
    """Descriptions come from the network: damage gives ConfigError, never another exception."""
    with pytest.raises(ConfigError):
        FragmentPlan.from_description(text)


@given(st.text() | st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["H", "first_round", "fragments", "spans", "first_step"]), x)).map(json.dumps))  # fmt: skip
def test_garbage_is_a_configuration_error(text: str) -> None:
    """Any text at all is either a plan or a ConfigError."""
    with pytest.raises(ConfigError):
        FragmentPlan.from_description(text)


def test_impossible_plans_are_refused_with_the_reason() -> None:
    """Empty models, unknown layouts and offsets that do not fit name the key and the value."""
    with pytest.raises(ConfigError, match="no trainable tensor"):
        build_plan({}, 30)
    with pytest.raises(ConfigError, match=r"stream.layout = 'odd'"):
        build_plan(SHAPES, 30, layout="odd")
    with pytest.raises(ConfigError, match=r"must hold 4 steps"):
        build_plan(SHAPES, 30, frag_layers=1, offsets=[0, 1])
    with pytest.raises(ConfigError, match=r"from 0 to H-1 = 29"):
        build_plan(SHAPES, 30, frag_layers=1, offsets=[0, 1, 2, 30])


def test_given_offsets_are_used() -> None:
    """An explicit list of offsets becomes the fragments' first steps."""
    plan = build_plan(SHAPES, 30, frag_layers=1, offsets=[3, 1, 4, 15])
    assert [f.first_step for f in plan.fragments] == [3, 1, 4, 15]
