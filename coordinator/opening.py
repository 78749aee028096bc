"""A journal folder opened for a coordinator or for a standby, with the machine that goes on from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diloco.comms.machine import Action
from diloco.config import RunConfig
from diloco.coordinator.journal import Journal, open_journal
from diloco.coordinator.journal_copy import is_copy, mark_copy, node_name, set_aside
from diloco.coordinator.lead import Lead
from diloco.coordinator.standby import Standby
from diloco.coordinator.state import Coordinator
from diloco.errors import ConfigError, StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """`actions` are to be performed before any event; `records` is how many there were."""

    journal: Journal
    machine: Lead | Standby
    records: int
    actions: Sequence[Action] = ()


def open_lead(config: RunConfig, folder: Path, *, resume: bool) -> Opened:
    """To coordinate a run. Raises ConfigError for a journal that a standby may have or that does not fit `resume`."""
    journal = open_journal(folder, resume=resume, fsync=config.topology.fsync)
    try:
        records = journal.read()
        if records and is_copy(folder, records):
            raise ConfigError(
                f"{str(folder)!r} holds a standby's copy of a journal, which may lack records: start it with --standby "
                "HOST:PORT, and it takes over by itself when it may. If the coordinator's own journal is lost for good, "
                f"remove {str(folder / 'copy')!r} first"
            )
        mark_copy(folder, False)
        lead = Lead(Coordinator(config))
        actions = lead.restore(records, time.monotonic()) if records else []
    except BaseException:
        journal.close()
        raise
    if lead.undecided:
        names = ", ".join(name for name, _ in lead.bonds[-1].witnesses)
        log.warning(
            "this run has a standby, which may have taken over: waiting for it, or for more than half of %s (only if it "
            "never took over and never comes back: --topology.standby off)",
            names,
        )
    return Opened(journal, lead, len(records), actions)


def open_standby(config: RunConfig, folder: Path) -> Opened:
    """To follow a coordinator, from the records that are there. A copy that broke off unusable is begun again."""
    journal = Journal(folder, fsync=config.topology.fsync)
    try:
        if journal.empty:
            mark_copy(folder, True)
        return _standby(config, journal)
    except StorageError as error:
        journal.close()
        if not (folder / "copy").exists():
            raise
        log.warning("%s; copying the coordinator's journal again", error)
    except BaseException:
        journal.close()
        raise
    return _afresh(config, folder)


def start_afresh(config: RunConfig, journal: Journal) -> Opened:
    """The journal is not the coordinator's: put it aside and begin with an empty one."""
    journal.close()
    return _afresh(config, journal.folder)


def _afresh(config: RunConfig, folder: Path) -> Opened:
    log.warning("the journal that was here is now in %s", set_aside(folder))
    journal = Journal(folder, fsync=config.topology.fsync)
    try:
        mark_copy(folder, True)
        return _standby(config, journal)
    except BaseException:
        journal.close()
        raise


def _standby(config: RunConfig, journal: Journal) -> Opened:
    node = node_name(journal.folder)
    machine = Standby(config, node, journal.read(), journal.first, time.monotonic())
    return Opened(journal, machine, len(machine.chain))
