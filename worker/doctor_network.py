"""Checks of the way from this machine to the coordinator: name, port, certificates, clock, rates, and the run itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diloco.comms.address import parse_address
from diloco.comms.messages import PROTOCOL
from diloco.comms.query import LinkFacts, measure
from diloco.comms.tls import SOON_DAYS, Keys, day
from diloco.comms.tls_probe import Probe, probe
from diloco.config import RunConfig
from diloco.errors import ConfigError, DilocoError, RefusedError
from diloco.settings import difference, settings_json
from diloco.worker.corpus import resolve_format, source_files
from diloco.worker.data import load_tokenizer
from diloco.worker.finding import Finding, failed, ok, warn
from diloco.worker.model import build_model
from diloco.worker.session import ModelParameters

SKEW_S = 30.0
SLOW_BPS = 125_000  # 1 Mbit/s
_TEXT = ("text", "jsonl", "parquet")


def network(
    addresses: str, config: RunConfig | None, keys: Keys | None, *, keys_given: bool, proc: Path
) -> list[Finding]:
    """Everything about each of "host:port[,host:port]"; with keys that do not work only whether it can be reached."""
    found: list[Finding] = []
    for address in addresses.removeprefix("grpc://").split(","):
        try:
            parse_address(address)
        except ValueError as error:
            found.append(failed("coordinator", str(error), "write HOST:PORT", ConfigError))
            continue
        if keys_given and keys is None:
            found.append(warn("coordinator", f"{address}: not asked, the keys do not work", "see above"))
            continue
        found += _one(address, config, keys, proc)
    return found


def _one(address: str, config: RunConfig | None, keys: Keys | None, proc: Path) -> list[Finding]:
    reached = probe(address, keys)
    if reached.outcome == "unreachable":
        fix = "is it running, is this its --listen address, does a firewall let TCP through to it?"
        return [failed("coordinator", reached.words, fix)]
    if reached.outcome == "refused":
        return [failed("identity", f"{address}: {reached.words}", "see docs/security.md", RefusedError)]
    found = [ok("coordinator", f"{address} answers in {1e3 * reached.rtt_s:.1f} ms: {reached.words}")]
    found += _certificate(reached)
    try:
        facts = measure(address, keys)
    except RefusedError as error:
        return [*found, failed("identity", f"{address}: {error}", "see docs/security.md", RefusedError)]
    if facts is None:
        fix = "is it overloaded, or another program?"
        return [*found, failed("coordinator", f"{address}: no answer to GetStatus", fix)]
    found += [_clock(facts), *_rates(facts, proc)]
    if config is not None:
        found += _run(config, facts.status)
    return found


def _certificate(reached: Probe) -> list[Finding]:
    if reached.server is None:
        return []
    left = (reached.server.ends - time.time()) / 86400
    if left < SOON_DAYS:
        words = f"the coordinator's certificate ends on {day(reached.server.ends)}"
        return [warn("identity", words, "there: diloco keys init --renew --keys DIR")]
    return [ok("identity", f"the coordinator's certificate is good until {day(reached.server.ends)}")]


def _clock(facts: LinkFacts) -> Finding:
    words = f"the coordinator's clock is {facts.skew_s:+.2f} s from this one"
    if abs(facts.skew_s) > SKEW_S:
        fix = "set both clocks (timedatectl, chrony): certificates depend on them"
        return warn("clock", words, fix)
    return ok("clock", words)


def _rates(facts: LinkFacts, proc: Path) -> list[Finding]:
    from diloco.worker.doctor import largest_buffer

    words = (
        f"up {8e-6 * facts.up_bps:.1f} Mbit/s, down {8e-6 * facts.down_bps:.1f} Mbit/s, "
        f"round trip {1e3 * facts.rtt_s:.1f} ms (1 MiB each way)"
    )
    slowest = min(facts.up_bps, facts.down_bps)
    if slowest < SLOW_BPS:
        fix = "diloco plan says which stream.H and codec.up keep a run computing on such a link"
        return [warn("link", words, fix)]
    found = [ok("link", words)]
    in_flight = 2 * max(facts.up_bps, facts.down_bps) * facts.rtt_s
    largest = largest_buffer(proc)
    if largest is not None and largest < in_flight:
        fix = f'sysctl -w net.ipv4.tcp_wmem="4096 16384 {int(2 * in_flight)}", or --connections 4'
        found.append(
            warn("tcp", f"send buffers end at {largest} bytes, this path wants {in_flight:.0f}", fix)
        )
    return found


def _run(config: RunConfig, status: Mapping[str, Any]) -> list[Finding]:
    """What the coordinator would say to a Join."""
    if status.get("protocol", PROTOCOL) != PROTOCOL:
        words = f"the coordinator speaks protocol {status['protocol']}, this side {PROTOCOL}"
        return [failed("run", words, "install the same version on both sides", RefusedError)]
    if status["run_id"] != config.run.run_id:
        words = f"run.run_id = {config.run.run_id!r}, the coordinator's is {status['run_id']!r}"
        return [failed("run", words, "use the run's own configuration", RefusedError)]
    try:
        theirs = settings_json(RunConfig.from_dict(status["config"]))
    except ConfigError as error:
        words = f"the coordinator's configuration is not one of this version: {error}"
        return [failed("run", words, "install the same version on both sides", RefusedError)]
    if (other := difference(theirs, settings_json(config))) is not None:
        return [failed("run", other.replace("on the worker", "here"), "copy the run's file", RefusedError)]
    found = [
        ok("run", f"{status['run_id']!r}, {status['phase']}, {status['commits']} commits; same settings")
    ]
    return [*found, *_plan(config, status)]


def _plan(config: RunConfig, status: Mapping[str, Any]) -> list[Finding]:
    """Whether the model is cut into the same fragments; models of one's own are not built for that."""
    theirs = status.get("plan")
    if not theirs or config.model.factory is not None:
        return []
    try:
        ours = _digest(config)
    except DilocoError as error:
        return [failed("plan", str(error), "correct [model] or [data]", ConfigError)]
    if ours is None:
        return []
    if ours != theirs:
        words = "this configuration cuts the model into other fragments than the run's"
        fix = "compare model.preset, data.tokenizer and stream.* with the run's"
        return [failed("plan", words, fix, RefusedError)]
    return [ok("plan", f"same fragments, digest {ours[:12]}")]


def _digest(config: RunConfig) -> str | None:
    """Of the plan; None where only the data would tell the size of the vocabulary."""
    d = config.data
    if d.source != "stdlib" and resolve_format(d.source, source_files(d.source), d.format) not in _TEXT:
        return None
    vocabulary = load_tokenizer(d.tokenizer).vocab_size
    model = build_model(config.model.preset, config.model.sequence_length, 0, vocabulary, device="meta")
    return ModelParameters(model, config).plan.digest()
