"""A worker alone with a coordinator's words: answers that overtake its own encoding, and words about no fragment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diloco.comms.machine import COORDINATOR, Action, Compute, Computed, Connected, Received, Send
from diloco.comms.messages import (
    Aborted,
    Commit,
    Contribution,
    Fetch,
    Message,
    Rejected,
    Resend,
    Snapshot,
    Welcome,
)
from diloco.worker.replica import Replica
from tests.toy import Cluster, ToyModel, config, plan_of

torch.set_num_threads(1)


class Alone:
    """A replica in its first inner steps, as the first worker of a run; its jobs are run by the test."""

    def __init__(self, **stream: Any) -> None:
        c = config(codec={"up": "int8", "ef": "on"}, stream={"layout": "single", **stream})
        self.model = ToyModel(plan_of(c), 0)
        self.replica = Replica(plan_of(c), c, self.model, worker="w0", nonce=1)
        self.replica.handle(Connected(COORDINATOR), 0.0)
        self.hear(Welcome("w0", 1, 0, 1, 1, 0, versions=(0,), initial=True))
        self.replica.merge()

    def hear(self, message: Message) -> list[Action]:
        return self.replica.handle(Received(COORDINATOR, message), 1.0)

    def until_it_encodes(self) -> Compute:
        """Train until the fragment's turn comes."""
        while True:
            assert not self.replica.blocked
            self.replica.merge()
            self.model.train_step(self.replica.step + 1)
            for action in self.replica.after_step(10, 1.0):
                if isinstance(action, Compute):
                    return action

    def end(self, job: Compute) -> list[Message]:
        """The job runs; what is sent then."""
        return [a.message for a in self.replica.handle(Computed(job.job()), 1.0) if isinstance(a, Send)]


def test_a_round_that_is_given_up_while_it_is_encoded_leaves_no_message_in_doubt() -> None:
    """Nothing is sent, the merge waits for the encoding, and the residual is as if the round had not been."""
    alone = Alone()
    job, slot = alone.until_it_encodes(), alone.replica.slots[0]
    assert slot.flight is not None and slot.feedback is not None
    first = slot.flight.round
    alone.hear(Aborted(0, first, ""))
    alone.replica.after_step(10, 1.0)  # the merge is due
    assert alone.replica.blocked
    assert alone.end(job) == [] and not slot.feedback.pending and not alone.replica.blocked
    assert slot.feedback.residual is not None and not bool(slot.feedback.residual.any())
    (sent,) = alone.end(alone.until_it_encodes())
    assert isinstance(sent, Contribution) and sent.round == first + 1


def test_a_round_that_counted_while_it_was_encoded_anew_is_settled() -> None:
    """A worker back from its checkpoint repeats a round of which the commit comes first: the residual is the round's."""
    alone = Alone()
    job, slot = alone.until_it_encodes(), alone.replica.slots[0]
    assert slot.flight is not None and slot.feedback is not None
    commit = Commit(0, 1, ((0, 1.0),), ((0, slot.flight.round),), "no digest", ((0, b""),))
    (opening,) = [a for a in alone.hear(commit) if isinstance(a, Compute)]
    assert isinstance(alone.end(opening)[0], Fetch)  # it cannot be opened, but says who is in it
    assert alone.end(job) == [] and not slot.feedback.pending
    assert slot.feedback.residual is not None and bool(slot.feedback.residual.any())


def test_a_checkpoint_between_answer_and_encoding_holds_nobody_up() -> None:
    """Whoever starts from it merges the round that was given up; there is nothing left to encode."""
    alone, back = Alone(), Alone()
    alone.until_it_encodes()
    flight = alone.replica.slots[0].flight
    assert flight is not None
    alone.hear(Aborted(0, flight.round, ""))
    alone.replica.after_step(10, 1.0)
    assert alone.replica.blocked
    back.replica.load_state_dict(alone.replica.state_dict())
    assert not back.replica.blocked
    back.replica.merge()
    assert back.replica.slots[0].flight is None


def test_a_slot_that_is_forgotten_while_it_encodes_sends_nothing_and_starts_anew() -> None:
    """What was encoded belongs to the error feedback of the value that was given up."""
    alone = Alone()
    job, slot = alone.until_it_encodes(), alone.replica.slots[0]
    slot.forget()
    assert alone.end(job) == []
    assert slot.feedback is not None and not slot.feedback.pending and slot.feedback.residual is None


@pytest.mark.parametrize("fragment", [1, 2**32 - 1])
def test_words_about_no_fragment_of_the_plan_are_dropped(fragment: int) -> None:
    """No error and no answer; a welcome to another number of fragments is one of them."""
    alone = Alone()
    commit = Commit(fragment, 1, ((0, 1.0),), ((0, 0),), "", ())
    for message in (
        *(commit, Rejected(fragment, 0, "late"), Aborted(fragment, 0, ""), Resend(fragment, 0)),
        *(Snapshot(fragment, 1, "", ()), Welcome("w0", 9, 9, 1, 1, 0, versions=())),
    ):
        assert alone.hear(message) == [], message
    assert alone.replica.incarnation == 1 and alone.replica.rejections == []


def test_digests_of_no_fragment_are_not_remembered() -> None:
    """Else a worker could fill the coordinator's memory with fragments that there are not; what there is is noted."""
    cluster = Cluster(config())
    c = cluster.coordinator
    cluster.sim.run(600.0, lambda: len(c.ledgers) == len(c.plan.fragments) if c.plan else False)
    member = c.members["w0"]
    for fragment in (4, 5, 2**32 - 1, 1):
        c.handle(Received("w0", Fetch("w0", member.incarnation, fragment, "x")), cluster.sim.now)
    assert member.differed == {1: "x"} and c.rejections["digest_differs"] == 1
