"""A worker whose round a commit did not count: what it waits for, and what its error feedback becomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.comms import frame
from diloco.comms.codec import get
from diloco.comms.machine import COORDINATOR, Action, Compute, Computed, Connected, Received, Send
from diloco.comms.messages import COUNTS_LATER, Commit, Contribution, Message, Rejected, Welcome
from diloco.worker.replica import Replica
from diloco.worker.replica_slots import Flight, Slot
from tests.toy import ToyModel, config, plan_of

torch.set_num_threads(1)


class Alone:
    """A replica with one fragment whose first contribution has been sent and not been answered."""

    def __init__(self, policy: str, *, alpha: float = 0.5, **codec: Any) -> None:
        c = config(
            codec={"up": "e3m0", "down": "g_fp32", "ef": "on", "ef_beta": 1.0, **codec},
            stream={"layout": "single", "tau": 1, "alpha": alpha},
            fault={"late": policy},
        )
        self.model = ToyModel(plan_of(c), 0)
        self.replica = Replica(plan_of(c), c, self.model, worker="w0", nonce=1)
        self.replica.handle(Connected(COORDINATOR), 0.0)
        self.hear(Welcome("w0", 1, 0, 1, 1, 0, versions=(0,), initial=True))
        self.replica.merge()
        sent: list[Message] = []
        while not sent:
            self.model.train_step(self.replica.step + 1)
            sent = self.work(self.replica.after_step(10, 1.0))
            self.replica.merge()
        (self.sent,) = sent
        assert isinstance(self.sent, Contribution) and self.feedback.pending
        assert self.feedback.residual is not None
        self.kept = self.feedback.residual.clone()  # what the payload did not say
        self.delta = self.kept + frame.decode_frame(self.sent.frame, codec=self.replica.codecs[0])[1]

    @property
    def slot(self) -> Slot:
        return self.replica.slots[0]

    @property
    def flight(self) -> Flight:
        assert self.slot.flight is not None
        return self.slot.flight

    @property
    def feedback(self) -> Any:
        return self.slot.feedback

    def hear(self, message: Message) -> list[Message]:
        return self.work(self.replica.handle(Received(COORDINATOR, message), 1.0))

    def work(self, actions: list[Action]) -> list[Message]:
        """Run the jobs; what is sent."""
        found: list[Message] = []
        for action in actions:
            if isinstance(action, Compute):
                found += self.work(self.replica.handle(Computed(action.job()), 1.0))
            elif isinstance(action, Send):
                found.append(action.message)
        return found

    def commit(self, version: int = 1, counts: bool = False) -> None:
        """A commit of others, or one with this worker's round; its value is a number everywhere."""
        value = torch.full_like(self.delta, float(version))
        framed = frame.encode_frame(
            get("fp32"),
            value,
            fragment=0,
            round=version,
            base_version=version - 1,
            run_id=self.replica.run_hash,
            worker=0,
            incarnation=0,
            steps=0,
            tokens=0,
        )
        index = 0 if counts else 5
        rounds = ((index, self.sent.round),) if isinstance(self.sent, Contribution) else ()
        self.hear(Commit(0, version, ((index, 1.0),), rounds, frame.digest(value), ((0, framed),)))

    def word(self, reason: str) -> None:
        assert isinstance(self.sent, Contribution)
        self.hear(Rejected(0, self.sent.round, reason))

    def due(self) -> Tensor:
        """One more step: the merge is due. What the model holds before it."""
        self.model.train_step(self.replica.step + 1)
        self.work(self.replica.after_step(10, 1.0))
        return self.model.read(0)


@pytest.mark.parametrize("policy", ["carry", "discount"])
@pytest.mark.parametrize("word_first", [True, False])
@pytest.mark.parametrize("reason", [COUNTS_LATER, "late"])
def test_a_late_round_stays_open_until_its_sender_knows_what_became_of_it(
    policy: str, word_first: bool, reason: str
) -> None:
    """The commit and the coordinator's word, in either order: error feedback builds on what counts, and only on that."""
    alone = Alone(policy)
    before = alone.due()
    steps: list[Callable[[], None]] = [partial(alone.word, reason), alone.commit]
    for said in steps if word_first else reversed(steps):
        assert alone.replica.blocked
        said()
    assert not alone.replica.blocked and alone.flight.outcome == "left-out"
    assert not alone.feedback.pending
    expected = alone.kept if reason == COUNTS_LATER else torch.zeros_like(alone.kept)
    assert torch.equal(alone.feedback.residual, expected)
    assert bool(alone.replica.rejections) == (reason == "late")
    alone.replica.merge()
    torch.testing.assert_close(alone.model.read(0), 0.5 * before + 0.5 * torch.ones_like(before))
    alone.word(reason)  # again: nothing happens
    assert torch.equal(alone.feedback.residual, expected) and alone.slot.flight is None


@pytest.mark.parametrize("policy", ["skip", "isolate", "rollback"])
def test_where_nothing_late_counts_nobody_waits_for_a_word(policy: str) -> None:
    """The commit alone ends the round, and the message is taken back."""
    alone = Alone(policy)
    alone.due()
    alone.commit()
    assert not alone.replica.blocked and alone.flight.outcome == "left-out"
    assert torch.equal(alone.feedback.residual, torch.zeros_like(alone.kept))


def test_a_round_that_the_next_commit_counts_needs_no_word() -> None:
    """It is in the value that is here: merged in."""
    alone = Alone("carry")
    alone.due()
    alone.commit()
    assert alone.replica.blocked and alone.flight.passed
    alone.commit(2, counts=True)
    assert not alone.replica.blocked and alone.flight.outcome == "merged-in" and alone.slot.version == 2
    assert torch.equal(alone.feedback.residual, alone.kept)


def test_a_contribution_that_is_refused_for_its_content_is_not_waited_for() -> None:
    """Not late but bad: the residual is as before, and it is not offered again."""
    alone = Alone("carry")
    alone.due()
    alone.word("norm: decoded norm 3 is not the header's 1")
    alone.commit()
    assert not alone.replica.blocked and alone.flight.refused
    assert torch.equal(alone.feedback.residual, torch.zeros_like(alone.kept))


def test_a_checkpoint_while_the_word_is_awaited_goes_on_waiting() -> None:
    """What was passed and what was said are part of it."""
    alone, back = Alone("carry"), Alone("carry")
    alone.due()
    alone.commit()
    back.due()
    back.replica.load_state_dict(alone.replica.state_dict())
    assert back.replica.blocked and back.flight.passed
    back.word(COUNTS_LATER)
    assert not back.replica.blocked and torch.equal(back.feedback.residual, alone.kept)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_recover_puts_what_the_merge_takes_away_into_the_error_feedback(alpha: float) -> None:
    """e_before + (1 - alpha) D: with the share alpha that stays in the parameters, all of D."""
    alone = Alone("skip", alpha=alpha, ef_recover=True)
    alone.due()
    alone.commit()
    alone.replica.merge()
    torch.testing.assert_close(alone.feedback.residual, (1 - alpha) * alone.delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["counted", "counted later", "refused", "off"])
def test_what_is_not_lost_is_not_recovered(case: str) -> None:
    """A round that counts, now or later, one that was bad, and a run that does not ask for it."""
    alone = Alone("carry" if case == "counted later" else "skip", ef_recover=case != "off")
    alone.due()
    if case in ("counted later", "refused"):
        alone.word(COUNTS_LATER if case == "counted later" else "values: one is not finite")
    alone.commit(counts=case == "counted")
    alone.replica.merge()
    kept = alone.kept if case.startswith("counted") else torch.zeros_like(alone.kept)
    assert torch.equal(alone.feedback.residual, kept)
