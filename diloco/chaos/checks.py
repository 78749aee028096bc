"""The promises as pure functions over journal records and what workers hold: each returns what is violated, in words.

Records are the journal's lines as dictionaries, in order. Nothing here reads a file or asks a process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Holding:
    """What a worker's checkpoint says it holds: `digest` of fragment `fragment` at `version`."""

    worker: str
    fragment: int
    version: int
    digest: str


def commits_of(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r["type"] == "commit"]


def versions(records: Sequence[Record]) -> dict[int, int]:
    """The newest committed version of each fragment."""
    return {int(r["fragment"]): int(r["version"]) for r in commits_of(records)}


def gaps(records: Sequence[Record]) -> list[str]:
    """Per fragment the commits' versions are 1, 2, ..., n: none is missing, none is there twice."""
    found, newest = [], dict[int, int]()
    for record in commits_of(records):
        p, version, before = (
            int(record["fragment"]),
            int(record["version"]),
            newest.get(int(record["fragment"]), 0),
        )
        if version != before + 1:
            what = "doubled" if version <= before else "missing before it"
            found.append(f"fragment {p}: commit {version} follows {before}: a commit is {what}")
        newest[p] = max(before, version)
    return found


def counted_twice(records: Sequence[Record]) -> list[str]:
    """Within a commit every worker counts once and the weights sum to 1; no work counts in two commits.

    A worker's rounds of one fragment rise from commit to commit within a life of it; a new life, which may repeat
    rounds of the last, begins with a `member` record.
    """
    found: list[str] = []
    newest: dict[tuple[int, int], int] = {}  # (fragment, index) -> last round that counted
    for record in records:
        if record["type"] == "member":
            newest = {key: r for key, r in newest.items() if key[1] != int(record["index"])}
        if record["type"] != "commit":
            continue
        p, version = int(record["fragment"]), int(record["version"])
        where, indices = f"fragment {p}, commit {version}", [int(i) for i in record["indices"]]
        if len(set(indices)) != len(indices):
            found.append(f"{where}: a worker is counted twice: {indices}")
        if not math.isclose(sum(record["weights"]), 1.0, abs_tol=1e-9):
            found.append(f"{where}: the weights sum to {sum(record['weights']):g}")
        for index, number in zip(indices, record["rounds"], strict=True):
            if int(number) <= newest.get((p, index), -1):
                found.append(f"{where}: round {number} of worker {index} had been counted before")
            newest[p, index] = int(number)
    return found


def lost(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """The journal only grows: every record that was there is there still, unchanged and in its place."""
    for i, record in enumerate(before):
        if i >= len(after) or dict(after[i]) != dict(record):
            what = f"{record['type']} record {i + 1}"
            return [
                f"the journal had {len(before)} records and {what} is {'gone' if i >= len(after) else 'changed'}"
            ]
    return []


def ahead(records: Sequence[Record], members: Iterable[Mapping[str, Any]]) -> list[str]:
    """No worker has merged a version that the journal does not have: nobody hears of a commit before it is durable."""
    durable, found = versions(records), []
    for member in members:
        for p, version in enumerate(member["versions"]):
            if version > durable.get(p, 0):
                found.append(
                    f"{member['id']} holds version {version} of fragment {p}, the journal {durable.get(p, 0)}"
                )
    return found


def unequal(records: Sequence[Record], holdings: Iterable[Holding]) -> list[str]:
    """What a worker holds at a version has the digest that the journal has for it."""
    digests = {(int(r["fragment"]), int(r["version"])): r["digest"] for r in commits_of(records)}
    digests |= {(int(r["fragment"]), 0): r["digest"] for r in records if r["type"] == "initial"}
    found = []
    for h in holdings:
        want = digests.get((h.fragment, h.version))
        if want is None:
            found.append(
                f"{h.worker} holds version {h.version} of fragment {h.fragment}, which is not in the journal"
            )
        elif want != h.digest:
            found.append(
                f"{h.worker}: version {h.version} of fragment {h.fragment} is {h.digest[:12]}, not {want[:12]}"
            )
    return found


def unlike_the_end(records: Sequence[Record], report: Mapping[str, Any], rebuilt: str) -> list[str]:
    """At the end: the report counts the journal's commits, all who stayed hold the same, and so does a rebuilt run."""
    found = []
    if sum(r["type"] == "complete" for r in records) != 1:
        found.append("the journal does not say once that the run is complete")
    if report["commits"] != len(commits_of(records)):
        found.append(f"the report counts {report['commits']} commits, the journal {len(commits_of(records))}")
    stayed = [w for w in report["workers"] if w["live"]]
    if not stayed:
        found.append("no worker stayed to the end")
    for worker in stayed:
        if worker["digest"] != report["global_digest"]:
            found.append(
                f"{worker['id']} ended with {worker['digest'][:12]}, not {report['global_digest'][:12]}"
            )
    if rebuilt != report["global_digest"]:
        found.append(
            f"the journal repeated gives {rebuilt[:12]}, the run ended with {report['global_digest'][:12]}"
        )
    return found


def committed_tokens(records: Sequence[Record], fragments: int, liars: frozenset[str] = frozenset()) -> float:
    """Tokens whose work is in the run's parameters: the mean over fragments, without those of `liars`."""
    total = 0
    for record in commits_of(records):
        shares = zip(record["contributors"], record["tokens"], strict=True)
        total += sum(int(tokens) for name, tokens in shares if name not in liars)
    return total / fragments if fragments else 0.0
