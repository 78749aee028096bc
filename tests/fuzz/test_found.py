"""What damaged inputs have found: each stays refused, by the error that a caller knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diloco.comms import convert_following
from diloco.comms import diloco_v1_pb2 as pb
from diloco.comms.machine import Persist, Received, Send
from diloco.comms.messages import Heartbeat, Progress
from diloco.config import RunConfig
from diloco.coordinator.journal import Journal
from diloco.coordinator.replay import replay
from diloco.coordinator.state import Coordinator
from diloco.errors import ConfigError, CorruptDataError, StorageError
from tests.fuzz.machines import midway
from tests.toy import Cluster, config

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        "[run]\nseed = 1979-05-27",
        "[model]\npreset = 07:32:00",
        f"[run]\nseed = {'9' * 5000}",
        f"[stream]\noffsets = {'[' * 2000}{']' * 2000}",
    ],
)
def test_a_value_that_no_key_takes_is_a_configuration_error(text: str) -> None:
    """Dates, numbers longer than Python reads, nesting beyond its stack; in a file and in an override."""
    with pytest.raises(ConfigError):
        RunConfig.from_toml(text)
    section, key = text.splitlines()
    with pytest.raises(ConfigError):
        RunConfig.from_toml("", [f"{section.strip('[]')}.{key.replace(' = ', '=')}"])


def test_a_file_that_is_no_text_is_a_configuration_error(tmp_path: Path) -> None:
    """With its name."""
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"run\.toml.*UTF-8"):
        RunConfig.load(tmp_path / "run.toml")


def test_offsets_can_be_given_in_a_file() -> None:
    """A list of whole numbers, and nothing that only looks like one."""
    assert RunConfig.from_toml("[stream]\nH = 9\noffsets = [0, 3]").stream.offsets == (0, 3)
    for wrong in ("[0.5]", "['1']", "[true]", "3"):
        with pytest.raises(ConfigError, match="offsets"):
            RunConfig.from_toml(f"[stream]\noffsets = {wrong}")


@pytest.mark.parametrize(
    "record",
    [
        DEEP,
        '{"type":"epoch","epoch":"x"}',
        '{"type":"epoch","epoch":null}',
        '{"type":"commit","weights":[NaN]}',
    ],
)
def test_a_record_from_afar_is_one_before_it_is_kept(record: str) -> None:
    """A standby would have kept it, and ended at the next line of its own code."""
    with pytest.raises(CorruptDataError, match="record"):
        convert_following.entry_from_proto(pb.FollowEntry(record=record), None)


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"type":["commit"]}',
        '{"type":"commit","fragment":0}',
        '{"type":"snapshot","fragment":"0","version":1}',
        '{"type":"initial","blobs":{"file":"00000000.bin"}}',
        '{"type":"initial","blobs":{"file":"../../../etc/passwd","sizes":[1]}}',
        '{"type":"initial","blobs":{"file":"00000000.bin","sizes":["1"]}}',
        '{"type":"initial","blobs":[]}',
    ],
)
def test_a_line_that_is_json_and_no_record_is_damage_with_a_number(tmp_path: Path, line: str) -> None:
    """And a journal reads no file but its own."""
    (tmp_path / "journal.jsonl").write_text('{"type":"epoch","epoch":1}\n' + line + "\n")
    journal = Journal(tmp_path, fsync=False)
    try:
        with pytest.raises(StorageError, match="line 2 is damaged"):
            journal.read()
    finally:
        journal.close()


@pytest.fixture(scope="module")
def run() -> Cluster:
    return midway(config(topology={"workers": 3, "checkpoint_every_commits": 3}), 12.0)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("start", "plan", "{}"),
        ("start", "members", 3),
        ("start", "members", [{}]),
        ("commit", "indices", None),
        ("commit", "indices", [0]),
        ("commit", "fragment", 99),
        ("commit", "tokens", None),
        ("snapshot", "names", []),
        ("snapshot", "names", ["state.momentum", "params"]),
        ("snapshot", "fragment", {}),
        ("initial", "fragment", "x"),
    ],
)
def test_a_damaged_record_is_named_when_it_is_repeated(run: Cluster, kind: str, key: str, value: Any) -> None:
    """By number and type, whatever is wrong with it; a key that is gone as well."""
    at = next(i for i, (record, _) in enumerate(run.disk.records) if record["type"] == kind)
    for damaged in ({key: value}, {}):
        records = [(dict(record), blobs) for record, blobs in run.disk.records]
        del records[at][0][key]
        records[at][0].update(damaged)
        with pytest.raises(StorageError, match=rf"record {at} of \d+ \({kind}\) is damaged"):
            replay(Coordinator(run.config), records, 0.0)


def test_a_commit_whose_repetition_is_no_number_is_damage() -> None:
    """A standby's job would have ended in an error that its machine does not hear of."""
    cluster = midway(config(topology={"workers": 3}), 8.5)
    at = next(i for i, (record, _) in enumerate(cluster.disk.records) if record["type"] == "commit")
    records = [(dict(record), blobs) for record, blobs in cluster.disk.records]
    records[at][0]["weights"] = [1e300] * len(records[at][0]["weights"])
    with pytest.raises(StorageError, match=rf"record {at} of .*NonFinite"):
        replay(Coordinator(cluster.config), records, 0.0)


def test_a_heartbeat_is_answered_once_a_fragment_however_often_it_names_it() -> None:
    """100,000 entries would have been as many answers."""
    cluster = midway(config(topology={"workers": 3}), 8.5)
    member = cluster.coordinator.members["w2"]
    rounds = tuple((0, 50 + number) for number in range(100_000))
    beat = Heartbeat("w2", member.incarnation, Progress(), cluster.coordinator.versions(), rounds)
    actions = cluster.coordinator.handle(Received("w2", beat), cluster.sim.now)
    sent = [action for action in actions if isinstance(action, Send)]
    assert len(sent) <= 2 * len(cluster.coordinator.ledgers)
    assert not [action for action in actions if isinstance(action, Persist)]
