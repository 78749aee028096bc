"""The link model against the published tables, its monotonicity, and the settings that the planner chooses."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from diloco import linkmodel, planner
from diloco.cli import main
from diloco.comms.codec import get
from diloco.comms.frame import HEADER_SIZE
from diloco.config import RunConfig
from diloco.errors import ConfigError
from diloco.loss_costs import MEASURED_CODECS, MEASURED_H, loss_costs
from diloco.published import ROWS


def literal_utilization(
    bw: float, L: int, T: float, gbits: float, method: str, H: int, tau: int, frag: int, steps: int, M: int
) -> float:
    """The simulator as written down in the specification: one addition for every node of every step."""
    T *= 4 / 3
    f, a, w = 0.4 * T / L, 0.3 * T / L, 0.3 * T / L
    r = gbits * 2 * (1 - 1 / M) / L / bw
    P = math.ceil(L / frag)
    gap = max(1, H // (P + 1))
    due: list[deque[tuple[int, float]]] = [deque() for _ in range(L)]
    clock = net = work = 0.0
    for s in range(steps):
        for layer in range(L):
            while due[layer] and due[layer][0][0] <= s:
                clock = max(clock, due[layer].popleft()[1])
            clock += f
            work += f
        for layer in reversed(range(L)):
            if layer > 0:
                clock += a
                work += a
            clock += w
            work += w
            turn = s % gap == 0 and layer % P == (s // gap) % (P + 1)
            if {"dp": True, "diloco": s % H == 0, "streaming": turn}[method]:
                net = max(net, clock) + r
                due[layer].append((s + 1 + tau, net))
    return work / clock


runs = st.fixed_dictionaries(
    {
        "L": st.integers(1, 9),
        "T": st.floats(0.01, 10),
        "method": st.sampled_from(linkmodel.METHODS),
        "H": st.integers(1, 40),
        "tau": st.integers(0, 4),
        "frag": st.integers(1, 4),
        "steps": st.integers(1, 60),
        "M": st.integers(2, 5),
    }
)
bandwidths = st.floats(0.1, 1000)
sizes = st.floats(0.1, 1000)


@settings(deadline=None)
@given(runs, bandwidths, sizes)
def test_skipping_idle_layers_changes_nothing(run: dict[str, Any], bw: float, gbits: float) -> None:
    """The fast simulator equals the literal one; 1e-11 covers some 1,000 additions that round differently."""
    assert planner.utilization(bw, gbits=gbits, **run) == pytest.approx(
        literal_utilization(bw, gbits=gbits, **run), rel=1e-11
    )


@settings(deadline=None)
@given(runs, bandwidths, sizes, st.floats(1, 100))
def test_utilisation_never_falls_with_bandwidth_or_with_fewer_bits(
    run: dict[str, Any], bw: float, gbits: float, factor: float
) -> None:
    """Exactly: the same additions in the same order, and rounding keeps the order of its inputs."""
    slow = planner.utilization(bw, gbits=gbits, **run)
    assert slow <= planner.utilization(bw * factor, gbits=gbits, **run)
    assert slow <= planner.utilization(bw, gbits=gbits / factor, **run)
    assert 0 < slow <= 1


@settings(deadline=None)
@given(runs, bandwidths, sizes)
def test_utilisation_never_falls_with_overlap(run: dict[str, Any], bw: float, gbits: float) -> None:
    """To rounding: other overlaps group the additions differently."""
    late = planner.utilization(bw, gbits=gbits, **run | {"tau": run["tau"] + 1})
    assert planner.utilization(bw, gbits=gbits, **run) <= late * (1 + 1e-11)


@settings(max_examples=20, deadline=None)
@given(runs, sizes)
def test_a_link_without_limit_never_stalls(run: dict[str, Any], gbits: float) -> None:
    """A reduction that takes no time cannot be waited for."""
    assert planner.utilization(1e30, gbits=gbits, **run) == pytest.approx(1, rel=1e-11)


def test_one_blocking_reduction_costs_its_closed_form() -> None:
    """Data parallel with one layer: each step but the first waits for the whole of the reduction before it."""
    steps, T = 50, 0.3
    reduction = linkmodel.allreduce_seconds(1e9, 16, 100e9, workers=4)
    assert reduction == pytest.approx(2 * 0.75 * 16 / 100)
    total = linkmodel.data_parallel_seconds(steps, T, reduction) - reduction
    published = T * 3 / 4 / 0.7  # the only layer is the first: no backward pass of activations, 0.7 of a step
    busy = planner.utilization(100, 1, published, 16, "dp", 1, steps=steps, M=4)
    assert busy == pytest.approx(steps * T / total)


def test_closed_forms_agree_where_they_meet() -> None:
    """DiLoCo with H = 1 is data parallel, latency adds once, and no overlap needs an infinite link."""
    reduction = linkmodel.allreduce_seconds(1e9, 16, 1e9, 2, latency_s=0.5)
    assert reduction == 16.5
    assert linkmodel.diloco_seconds(10, 2.0, reduction, 1) == linkmodel.data_parallel_seconds(
        10, 2.0, reduction
    )
    assert linkmodel.diloco_seconds(100, 2.0, reduction, 50) == 200 + 2 * 16.5
    assert linkmodel.zero_stall_bits_per_s(1e9, 16, 1.0, 100, 0, 0.1, 1.0) == math.inf
    assert linkmodel.zero_stall_bits_per_s(1e9, 16, 2.0, 100, 1, 0.125, 1.0) == 1e9  # a fragment in one step
    assert linkmodel.zero_stall_bits_per_s(1e9, 16, 2.0, 100, 50, 0.125, 1.0) == 8e7  # the model in H steps


def test_zero_stall_bandwidth_keeps_the_simulator_busy() -> None:
    """On the link that the closed form asks for, streaming loses under one percent."""
    L, frag, H, tau, T, bits = 24, 3, 100, 2, 0.5, 4
    bits_per_s = linkmodel.zero_stall_bits_per_s(1e9, bits, T, H, tau, frag / L, 1.0)
    assert planner.utilization(bits_per_s / 1e9, L, T * 3 / 4, bits, "streaming", H, tau, frag) > 0.99
    assert planner.utilization(bits_per_s / 2e9, L, T * 3 / 4, bits, "streaming", H, tau, frag) < 0.99


def test_all_published_cells_lie_within_one_grid_step() -> None:
    """arXiv 2501.18512 table 4 and 2503.09799 table 6: 75 cells each, 47 and 52 of them exact."""
    table = planner.published_table()
    assert len(table) == 150
    assert [cell for cell in table if abs(cell["grid_steps"]) > 1] == []
    assert sum(cell["grid_steps"] == 0 for cell in table[:75]) == 47
    assert sum(cell["grid_steps"] == 0 for cell in table[75:]) == 52


def test_published_numbers_are_points_of_the_grid() -> None:
    """Every number of the data prints as some grid point, so that no typing error hides in the comparison."""
    shown = {planner.printed(value) for value in planner.GRID} | {math.inf}
    assert [row for row in ROWS if not shown.issuperset(row.gbit_per_s)] == []
    assert all(list(row.gbit_per_s) == sorted(row.gbit_per_s) for row in ROWS)


def test_a_cell_carries_what_readers_of_the_table_need() -> None:
    """The names are an interface; a bandwidth above the grid is null, which JSON can carry."""
    table = planner.published_table()
    assert {tuple(cell) for cell in table} == {
        ("model", "method", "target", "published", "ours", "grid_steps")
    }
    methods = {"dp", "diloco", "streaming", "overlap", "fp4", "h1", "h10", "h50", "h100", "h300"}
    assert {cell["method"] for cell in table} == methods
    assert {cell["target"] for cell in table} == {50, 80, 90, 95, 99}
    above = [cell for cell in table if cell["published"] is None]
    assert [(cell["model"], cell["method"], cell["target"]) for cell in above] == [("671B", "h1", 99)]
    first = table[0]
    assert (first["model"], first["method"], first["target"], first["published"]) == ("1B", "dp", 50, 86.8)


def test_a_fast_link_keeps_the_mildest_settings() -> None:
    """With bandwidth to spare nothing is traded: 16 bits, one step of overlap, H = 30."""
    plan = planner.recommend(1e9, 0.5, 1e12, 4)
    assert (plan.H, plan.tau, plan.codec, plan.reaches_target) == (30, 1, "bf16", True)


def test_bytes_follow_the_wire_formulas() -> None:
    """Up is one frame per fragment; down is the others' payloads for two workers and one mean for more."""
    for workers, down in ((1, 0), (2, 1), (5, 1)):
        plan = planner.recommend(1e9, 0.5, 1e12, workers)
        assert plan.worker_bytes_up == 2 * 10**9 + plan.fragments * HEADER_SIZE
        assert plan.worker_bytes_down == down * plan.worker_bytes_up
        assert plan.coordinator_bytes == workers * (plan.worker_bytes_up + plan.worker_bytes_down)
    # bf16 ring among 5, both ways, 30 steps: 2 * 1.6 * 2 bytes; ours 2 * 2 bytes: 48 times less, less the headers
    assert plan.data_parallel_bytes == 192 * 10**9
    assert plan.times_less == pytest.approx(48, rel=1e-6)


@pytest.mark.parametrize("codec", ["bf16", "int8", "e3m0", "topk"])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 4096, 4097, 1_000_000])
def test_payload_sizes_are_those_of_the_codecs(codec: str, n: int) -> None:
    """The formulas that the planner prices with are the codecs' own."""
    assert planner.payload_bytes(codec, n) == get(codec).wire_size(n)


# A search over 200 settings each: a failing one is shown as found, shrinking it would take minutes.
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.floats(1e5, 1e11),
    st.floats(0.01, 30),
    st.floats(1e5, 1e12),
    st.integers(1, 40),
    st.sampled_from([0.5, 0.95]),
)
def test_a_plan_keeps_its_word_and_is_a_valid_configuration(
    params: float, step_time_s: float, link: float, workers: int, target: float
) -> None:
    """What is reached is what the simulator says for these settings, and a run accepts them."""
    plan = planner.recommend(params, step_time_s, link, workers, target=target)
    assert plan.reaches_target == (plan.utilisation >= target)
    assert plan.utilisation <= plan.ring_utilisation * (1 + 1e-11) or workers == 1
    assert plan.fragments <= plan.H
    again = planner.utilization(
        link / 1e9,
        plan.layers,
        step_time_s * 3 / 4,
        8 * plan.worker_bytes_up / 1e9,
        "streaming",
        plan.H,
        plan.tau,
        plan.frag_layers,
        steps=max(600, 6 * plan.H),
        traffic=plan.coordinator_bytes / plan.worker_bytes_up,
    )
    assert plan.utilisation == pytest.approx(again, rel=1e-9)
    shown = [f"{key}={value}" for key, value in plan.settings().items()]
    config = RunConfig.from_toml("", shown)
    assert (config.stream.H, config.codec.up) == (plan.H, plan.codec)


def test_workers_on_their_own_links_share_only_the_coordinators() -> None:
    """On a star the slower of two ways decides: one worker's traffic on its link, or everybody's on the coordinator's."""
    equal = planner.recommend(1e9, 0.5, 200e6, 4)
    same = planner.recommend(1e9, 0.5, 200e6, 4, coordinator_bits_per_s=200e6)
    assert equal == same
    wide = planner.recommend(1e9, 0.5, 200e6, 4, coordinator_bits_per_s=math.inf)
    assert planner.recommend(1e9, 0.5, 200e6, 4, coordinator_bits_per_s=800e6).utilisation == wide.utilisation
    assert (equal.codec, wide.codec) == ("topk", "e3m0") and wide.reaches_target  # dense is the milder
    # A coordinator's link of a quarter is as if all four were on one worker's.
    narrow = planner.recommend(1e9, 0.5, 800e6, 4, coordinator_bits_per_s=200e6)
    assert (narrow.H, narrow.tau, narrow.codec) == (equal.H, equal.tau, equal.codec)
    assert narrow.utilisation == pytest.approx(equal.utilisation)


def test_a_long_way_asks_for_more_overlap() -> None:
    """Four round trips of an exchange are waited for where they do not fit into tau steps."""
    near, far = (planner.recommend(1e9, 0.5, 1e12, 2, rtt_s=rtt) for rtt in (0.0, 0.2))
    assert (near.tau, far.tau) == (1, 2) and far.reaches_target
    assert far.needed_bits_per_s < math.inf
    hopeless = planner.recommend(1e9, 0.01, 1e12, 2, rtt_s=1.0)
    assert not hopeless.reaches_target and hopeless.needed_bits_per_s == math.inf


@settings(deadline=None)
@given(runs, bandwidths, sizes, st.floats(0, 10))
def test_latency_never_helps(run: dict[str, Any], bw: float, gbits: float, latency: float) -> None:
    """It delays what is waited for, and holds no link."""
    assert planner.utilization(bw, gbits=gbits, latency=latency, **run) <= planner.utilization(
        bw, gbits=gbits, **run
    )


def test_rates_of_a_plan_fit_its_links() -> None:
    """No peak is below the mean or above the link; a worker's mean is its bytes over the time of a round."""
    for workers in (1, 2, 8):
        plan = planner.recommend(1e9, 0.5, 200e6, workers)
        assert 0 < plan.worker_bits_per_s <= plan.worker_peak_bits_per_s <= 200e6 * 1.001
        assert plan.coordinator_bits_per_s <= plan.coordinator_peak_bits_per_s <= 200e6 * 1.001
        seconds = plan.H * 0.5 / plan.utilisation
        both = 8 * (plan.worker_bytes_up + plan.worker_bytes_down)
        assert plan.worker_bits_per_s == pytest.approx(both / seconds)


def test_loss_is_told_with_its_source_and_never_made_up() -> None:
    """Each number is a quotient of means that the quality benchmark measured; where nobody measured there is none."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "quality.json"
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    means = {row["name"]: row["mean"] for table in tables for row in table["rows"]}
    for H, share in MEASURED_H:
        assert share == pytest.approx(means[f"a-h{H}"] / means["parallel-long"] - 1, abs=1e-4)
    names = {name: f"c-{name}" for name in MEASURED_CODECS} | {"stat": "c-stat2", "topk": "c-topk-ef"}
    for codec, share in MEASURED_CODECS.items():
        assert share == pytest.approx(means[names[codec]] / means["h10"] - 1, abs=1e-4)
    known = {cost.setting: cost for cost in loss_costs(10, 0, "e3m0")}
    assert known["stream.H"].percent == pytest.approx(1.89, abs=0.01)
    assert known["stream.tau"].percent == 0.0
    for cost in loss_costs(50, 2, "bf16"):
        assert cost.percent is None and cost.note
    assert [c.setting for c in planner.recommend(1e9, 0.5, 1e9, 2).loss] == [
        "stream.H", "stream.tau", "codec.up",
    ]  # fmt: skip


# The command: given figures, and those of a finished run.


def report(tmp_path: Path, **inputs: Any) -> Path:
    measured = {
        "workers": 3, "parameters": 836736, "layers": 4, "step_time_s": 0.25, "up_bits_per_s": 12e6,
        "down_bits_per_s": 4e6, "rtt_s": 0.05,
    } | inputs  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps({"prediction": {"inputs": measured}}))
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["plan", "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_finished_run_is_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step time, link, round trip, workers and model come from report.json; folder and file are one."""
    run = report(tmp_path)
    found = asked(capsys, "--profile", str(run))
    assert found == asked(capsys, "--profile", str(run / "report.json"))
    # As much up as down: 12 and 4 Mbit/s one after the other are 6.
    assert found["asked"] == {
        "params": 836736, "step_time_s": 0.25, "link_bits_per_s": pytest.approx(6e6), "workers": 3, "layers": 4,
        "rtt_s": 0.05, "coordinator_bits_per_s": None,
    }  # fmt: skip
    plan = planner.recommend(836736, 0.25, 6e6, 3, layers=4, rtt_s=0.05, coordinator_bits_per_s=math.inf)
    assert (found["H"], found["codec"], found["utilisation"]) == (plan.H, plan.codec, plan.utilisation)
    assert main(["plan", "--profile", str(run)]) == 0
    assert "250.0 ms per step, link 6.0 Mbit/s, round trip 50.0 ms" in capsys.readouterr().out


def test_what_is_given_takes_the_place_of_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bigger model, another link: the rest stays measured."""
    run = report(tmp_path)
    flags = ("--params", "1e9", "--link", "1Gbit,20ms", "--workers", "8", "--coordinator-link", "10Gbit")
    found = asked(capsys, "--profile", str(run), *flags)["asked"]
    assert (found["params"], found["layers"], found["step_time_s"]) == (1e9, None, 0.25)
    assert (found["link_bits_per_s"], found["rtt_s"], found["workers"]) == (1e9, 0.02, 8)
    assert found["coordinator_bits_per_s"] == 1e10


def test_the_command_prints_everything_that_a_plan_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """H, fragments, overlap, codec, utilisation, bytes, mean and peak rate, and the loss to expect."""
    assert main(["plan", "--params", "1e9", "--step-time", "0.5", "--link", "200Mbit", "--workers", "4"]) == 0
    text = capsys.readouterr().out
    for word in (
        "(H)", "(tau)", "fragments", "codec", "utilisation", "MB up", "mean", "peak", "data parallel", "loss to expect",
        "stream.H", "stream.tau", "arXiv", "--codec.up",
    ):  # fmt: skip
        assert word in text, word


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "no measurements"),
        ('{"prediction": null}', "no measurements"),
        ('{"prediction": {"inputs": {"parameters": 5, "step_time_s": null}}}', "--step-time, --link too"),
    ],
)
def test_a_profile_that_does_not_help_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, word: str
) -> None:
    """With what is missing, and how to give it."""
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["plan", "--profile", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("link", ["200Mbit,", "200Mbit,fast", "200Mbit,5", "200Mbit,1.2.3ms", "x,5ms"])
def test_a_link_that_is_none_is_refused(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate, and after a comma a time with its unit."""
    assert main(["plan", "--params", "1e9", "--step-time", "1", "--link", link]) == 2
    assert "--link" in capsys.readouterr().err


def test_a_slow_link_takes_stronger_settings_or_is_said_to_be_too_slow() -> None:
    """200 Mbit/s and four workers at 1e9 parameters is feasible; 1 kbit/s is not, and the need is named."""
    plan = planner.recommend(1e9, 0.5, 200e6, 4)
    assert plan.reaches_target and plan.coordinator_bits_per_s <= 200e6
    hopeless = planner.recommend(1e9, 0.5, 1e3, 4)
    assert not hopeless.reaches_target and hopeless.utilisation < 0.01
    assert hopeless.needed_bits_per_s > 1e6


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ((0, 0.5, 1e9, 4), "params"),
        ((0.5, 0.5, 1e9, 4), "params"),
        ((1e9, -1.0, 1e9, 4), "step_time_s"),
        ((1e9, 0.5, math.nan, 4), "link_bits_per_s"),
        ((1e9, 0.5, math.inf, 4), "link_bits_per_s"),
        ((1e9, 0.5, 1e9, 0), "workers"),
    ],
)
def test_a_senseless_request_is_refused_by_name(request_: tuple[float, float, float, int], word: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(ConfigError, match=rf"^{word} = "):
        planner.recommend(*request_)


def test_senseless_options_are_refused_by_name() -> None:
    """Optional arguments, the simulator's arguments and codec names alike."""
    with pytest.raises(ConfigError, match="layers = 0"):
        planner.recommend(1e9, 0.5, 1e9, 2, layers=0)
    with pytest.raises(ConfigError, match="rtt_s = -1"):
        planner.recommend(1e9, 0.5, 1e9, 2, rtt_s=-1)
    with pytest.raises(ConfigError, match="coordinator_bits_per_s = 0"):
        planner.recommend(1e9, 0.5, 1e9, 2, coordinator_bits_per_s=0)
    with pytest.raises(ConfigError, match="latency = -1"):
        planner.utilization(1, 2, 1, 1, "dp", 10, latency=-1)
    with pytest.raises(ConfigError, match="target = 95"):
        planner.recommend(1e9, 0.5, 1e9, 2, target=95)
    with pytest.raises(ConfigError, match="did you mean 'diloco'"):
        planner.utilization(1, 2, 1, 1, "dilco", 10)
    with pytest.raises(ConfigError, match="tau = -1"):
        planner.utilization(1, 2, 1, 1, "dp", 10, tau=-1)
    with pytest.raises(ConfigError, match="bw = 0"):
        planner.utilization(0, 2, 1, 1, "dp", 10)
    with pytest.raises(ConfigError, match="codec = 'gzip'"):
        planner.payload_bytes("gzip", 10)
