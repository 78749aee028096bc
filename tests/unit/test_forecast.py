"""What a configured run should cost on a link, and the prediction that a report sets beside the measurement."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.comms.codec import get
from diloco.comms.frame import frame_size
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.forecast import Forecast, Site, forecast
from diloco.fragments import FragmentPlan, build_plan
from diloco.linkmodel import TRIPS_BACK, TRIPS_UP, diloco_seconds
from diloco.worker.prediction import predict, sentence

SHAPES = {"embed": (50, 8), "blocks.0.w": (16, 16), "blocks.1.w": (16, 16), "blocks.2.w": (16, 16)}
NAN = float("nan")


def plan(H: int = 10, **options: Any) -> FragmentPlan:
    return build_plan(SHAPES, H, **{"frag_layers": 2} | options)


def single(steps: int, site: Site, size: int, *, H: int = 10, **options: Any) -> Forecast:
    """One fragment of `size` bytes each way."""
    return forecast(plan(H, layout="single"), steps, site, [size], [size], **{"tau": 0} | options)


plans = st.builds(
    lambda H, frag_layers, first: plan(H, frag_layers=frag_layers, first_round=first),
    st.integers(3, 30),
    st.integers(1, 3),
    st.sampled_from(["short", "full"]),
)
sites = st.builds(Site, st.floats(0.01, 10), st.floats(1e3, 1e12), st.floats(1e3, 1e12), st.floats(0, 1))


def test_a_blocking_round_costs_its_closed_form() -> None:
    """Without overlap every H-th step waits for both transfers and four round trips: 2503.09799's formula."""
    site = Site(0.5, 8e6, 4e6, 0.05)
    found = single(100, site, 1_000_000)
    exchange = 1.0 + 2.0 + (TRIPS_UP + TRIPS_BACK) * 0.05
    assert found.seconds == pytest.approx(diloco_seconds(100, 0.5, exchange, 10))
    assert found.exposed_s == pytest.approx(10 * exchange) and found.hidden_s == pytest.approx(0.0, abs=1e-9)
    assert found.utilisation == pytest.approx(50 / found.seconds)


def test_overlap_hides_what_fits_into_it() -> None:
    """3.2 s of exchange in flight while 4 steps compute leave 1.2 s exposed; 7 steps hide it all."""
    site = Site(0.5, 8e6, 4e6, 0.05)
    some = single(100, site, 1_000_000, tau=4)
    # The last round has no steps left to hide behind: step 100 is the end.
    assert some.exposed_s == pytest.approx(9 * 1.2 + 3.2)
    assert some.hidden_s == pytest.approx(9 * 2.0)
    assert single(99, site, 1_000_000, tau=7).exposed_s == 0.0


@settings(deadline=None, max_examples=50)
@given(plans, st.integers(1, 200), st.booleans())
def test_bytes_are_those_of_every_turn(made: FragmentPlan, steps: int, flush: bool) -> None:
    """As often as the plan says, and once more where the run ends with a flush."""
    up = [100 + f.index for f in made.fragments]
    last = range(len(up)) if flush else ()
    found = forecast(made, steps, Site(1.0), up, [0] * len(up), tau=1, flush=last)
    turns = [p for step in range(1, steps + 1) for p in made.due(step)]
    assert found.bytes_up == sum(up[p] for p in turns) + flush * sum(up)
    assert found.bytes_down == 0 and found.peak_down_bps == 0.0


@settings(deadline=None, max_examples=50)
@given(plans, sites, st.integers(0, 3), st.floats(1, 100))
def test_a_better_link_never_costs_time(made: FragmentPlan, site: Site, tau: int, factor: float) -> None:
    """More bandwidth, less latency: never less utilisation; and times add up."""
    size = [10_000] * len(made.fragments)
    found = forecast(made, 60, site, size, size, tau=tau)
    better = Site(site.step_time_s, site.up_bps * factor, site.down_bps * factor, site.rtt_s / factor)
    assert found.utilisation <= forecast(made, 60, better, size, size, tau=tau).utilisation * (1 + 1e-9)
    assert 0 < found.utilisation <= 1 + 1e-9
    assert found.exposed_s + 60 * site.step_time_s == pytest.approx(found.seconds)


def test_an_unlimited_link_costs_nothing() -> None:
    """No bytes per second are too many for it."""
    found = single(100, Site(0.1), 10**9)
    assert found.utilisation == 1.0 and found.exposed_s == 0.0


def test_a_long_run_stands_for_itself() -> None:
    """Beyond a bound the beginning is scaled: same utilisation, all bytes."""
    site = Site(0.5, 8e6, 8e6, 0.05)
    short, long = (single(n, site, 1_000_000) for n in (20_000, 1_000_000))
    assert long.utilisation == pytest.approx(short.utilisation)
    assert long.bytes_up == 50 * short.bytes_up and long.seconds == pytest.approx(50 * short.seconds)


def test_peaks_are_means_over_a_second() -> None:
    """A burst shorter than a second is spread over it; a longer one shows the link's own rate."""
    assert single(99, Site(1.0, 8e6, 8e6), 100_000).peak_up_bps == pytest.approx(800_000)
    assert single(99, Site(1.0, 8e6, 8e6), 3_000_000).peak_up_bps == pytest.approx(8e6)
    assert single(99, Site(1.0), 100_000).peak_up_bps == pytest.approx(800_000)


def test_pacing_takes_its_share_of_the_window_and_no_more() -> None:
    """Half of the time to the merge passes before the contribution is through, 0.9 of the rest before the answer."""
    site = Site(1.0, 8e9, 8e9)
    paced = single(20, site, 1000, tau=4, pace=0.5)
    # Sent at step 10: through after 2 s, the answer after 1.8 s more. The second round has no window left.
    assert paced.hidden_s == pytest.approx(3.8, abs=1e-3) and paced.exposed_s == pytest.approx(3.8, abs=1e-3)


@pytest.mark.parametrize("link_bps", [4e6, 64e6])
def test_paced_traffic_is_even_in_both_directions(link_bps: float) -> None:
    """Fragments ten steps apart that may take nine: no second has more than 1.5 times the mean, up or down."""
    sizes = [20_000] * 3
    site = Site(0.08, link_bps, link_bps, 0.05)
    paced = forecast(plan(30), 600, site, sizes, sizes, tau=9, pace=0.37)
    free = forecast(plan(30), 600, site, sizes, sizes, tau=9)
    assert paced.peak_up_bps < 1.5 * paced.mean_up_bps and paced.peak_down_bps < 1.5 * paced.mean_down_bps
    assert free.peak_up_bps > 1.55 * free.mean_up_bps and free.peak_down_bps > 1.55 * free.mean_down_bps


def test_senseless_values_are_refused_by_name() -> None:
    """The error names the value."""
    for site, steps, word in (
        (Site(0.0), 10, "step_time_s"), (Site(1.0, up_bps=0), 10, "up_bps"), (Site(1.0, rtt_s=-1), 10, "rtt_s"),
        (Site(math.inf), 10, "step_time_s"), (Site(1.0), 0, "steps"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            single(steps, site, 1)
    with pytest.raises(ConfigError, match="1 and 1 fragments, the plan has 3"):
        forecast(plan(), 10, Site(1.0), [1], [1], tau=0)


# Prediction: settings and measurements in, figures beside figures out.


def member(**changes: Any) -> dict[str, Any]:
    return {
        "step": 100, "incarnation": 1, "compute_s": 50.0, "exposed_s": 5.0, "steps_per_s": 2.0, "bytes_up": 1000,
        "bytes_down": 3000, "link_up_bps": 8e6, "link_down_bps": 4e6, "rtt_s": 0.05,
    } | changes  # fmt: skip


def config(**parts: dict[str, Any]) -> RunConfig:
    base = {"stream": {"H": 10, "frag_layers": 2}, "codec": {"up": "fp32", "down": "g_fp32"}}
    return RunConfig.from_dict(base | parts)


def test_a_prediction_names_what_went_in_and_what_was_measured() -> None:
    """Inputs are medians and the slowest step; sums are over workers, rates of one of them."""
    found = predict(config(), plan(), [member(), member(compute_s=25.0, link_up_bps=6e6, rtt_s=NAN)])
    assert found is not None
    assert found["inputs"] == {
        "workers": 2, "parameters": 1168, "layers": 3, "step_time_s": 0.5, "up_bits_per_s": 6e6,
        "down_bits_per_s": 4e6, "rtt_s": 0.05,
    }  # fmt: skip
    measured = found["measured"]
    assert (measured["bytes_up"], measured["bytes_down"]) == (2000, 6000)
    assert measured["compute_utilisation"] == pytest.approx(75 / 85)
    assert measured["mean_up_bits_per_s"] == pytest.approx(8 * 2000 / 85)
    assert set(measured) == set(found) - {"inputs", "measured"}
    # Of two workers one needs half as long for a step: it waits for the other half of the time.
    assert found["compute_utilisation"] <= 0.75


def test_predicted_bytes_are_the_wires() -> None:
    """One frame up per turn and flush; down the fp32 value; at the start one worker's values, which the other gets."""
    made, fp32 = plan(), get("fp32")
    found = predict(config(), made, [member(), member()])
    assert found is not None
    values = sum(frame_size(fp32, f.numel) for f in made.fragments)
    turns = sum(frame_size(fp32, made.fragments[p].numel) for step in range(1, 101) for p in made.due(step))
    assert made.due(100) == (0,)
    assert found["bytes_up"] == values + 2 * (turns + values)
    assert found["bytes_down"] == values + 2 * (turns + values)
    relay = predict(config(codec={"up": "fp32", "down": "relay"}), made, [member()] * 3)
    assert relay is not None
    blocking = predict(
        config(stream={"H": 10, "frag_layers": 2, "overlap": "none"}), made, [member(), member()]
    )
    assert blocking is not None  # what was averaged whole after the last step is not sent again
    assert found["bytes_up"] - blocking["bytes_up"] == 2 * frame_size(fp32, made.fragments[0].numel)
    # Each gets the others' frames, and who joins the outer optimizer's state too.
    assert relay["bytes_down"] == 3 * 2 * (turns + values) + 2 * values


def test_one_worker_predicts_its_own_part() -> None:
    """It knows how many there are, and sums over itself."""
    alone = predict(config(), plan(), [member()], workers=2)
    both = predict(config(), plan(), [member(), member()])
    assert alone is not None and both is not None
    assert alone["inputs"]["workers"] == 2 and 2 * alone["bytes_down"] == both["bytes_down"]
    assert alone["compute_utilisation"] == both["compute_utilisation"]
    told = sentence(alone)
    assert "500.0 ms per step" in told and "8.00 Mbit/s up" in told and "round trip 50.0 ms" in told
    assert told.count("measured") == 5


@pytest.mark.parametrize(
    ("stream", "tau"),
    [({"overlap": "none"}, 0), ({"tau": 2}, 2), ({"overlap": "delayed"}, 10), ({"overlap": "eager"}, 10)],
)
def test_the_overlap_mode_decides_how_long_a_reply_may_take(stream: dict[str, Any], tau: int) -> None:
    """Whole rounds hide more than a few steps, blocking hides nothing."""
    slow = [member(link_up_bps=1e4, link_down_bps=1e5)] * 2
    made = config(stream={"H": 10, "frag_layers": 2, **stream}, codec={"up": "e3m0", "down": "relay"})
    found = predict(made, plan(), slow)
    assert found is not None
    sizes = [frame_size(get("e3m0"), f.numel) for f in plan().fragments]
    last = range(len(sizes)) if stream.get("overlap", "eager") == "eager" else range(1, len(sizes))
    same = forecast(plan(), 100, Site(0.5, 1e4, 1e5, 0.05), sizes, sizes, tau=tau, flush=last)
    assert found["compute_utilisation"] == pytest.approx(same.utilisation)


def test_what_nobody_measured_is_no_limit_and_no_training_is_no_prediction() -> None:
    """In one process there is no link; a worker that came back is judged by its speed, not by its last life's sum."""
    found = predict(config(), plan(), [member(link_up_bps=NAN, link_down_bps=NAN, rtt_s=NAN)])
    assert found is not None and found["compute_utilisation"] == 1.0
    assert found["inputs"]["up_bits_per_s"] is None and "link –" in sentence(found)
    back = predict(config(), plan(), [member(incarnation=2, compute_s=1.0)])
    assert back is not None and back["inputs"]["step_time_s"] == 0.5
    assert predict(config(), plan(), [member(step=0, compute_s=0.0, steps_per_s=0.0)]) is None
    assert predict(config(), plan(), []) is None


@pytest.mark.parametrize(
    "absurd",
    [
        {"compute_s": 0.0, "steps_per_s": 5e-324}, {"compute_s": -5.0, "steps_per_s": -1.0},
        {"compute_s": 1.7e308, "steps_per_s": NAN}, {"step": 0, "steps_per_s": 5e-324},
    ],
)  # fmt: skip
def test_a_speed_that_cannot_be_is_passed_over(absurd: dict[str, Any]) -> None:
    """Alone such a worker predicts nothing; beside another it changes no figure of the prediction."""
    assert predict(config(), plan(), [member(**absurd)]) is None
    both, alone = (predict(config(), plan(), [member(), *more]) for more in ([member(**absurd)], []))
    assert both is not None and alone is not None
    assert both["seconds"] == alone["seconds"] and both["inputs"] == alone["inputs"]


def test_a_speed_without_a_step_predicts_nothing() -> None:
    """Nobody has trained: there is no run to be predicted."""
    assert predict(config(), plan(), [member(step=0, steps_per_s=5.0)]) is None
