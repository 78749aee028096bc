"""The arithmetic between local and global parameters."""

from __future__ import annotations

import pytest
import torch

from diloco.delta import merge, merge_delay_corrected, pseudo_gradient, rebase

ANCHOR = torch.tensor([1.0, 2.0, -3.0])
LOCAL = torch.tensor([0.5, 2.5, -3.0])


def test_a_pseudo_gradient_is_old_minus_new() -> None:
    """Descending along it moves the anchor to the local value."""
    delta = pseudo_gradient(ANCHOR, LOCAL)
    assert torch.equal(delta, torch.tensor([0.5, -0.5, 0.0]))
    assert torch.equal(ANCHOR - delta, LOCAL)


def test_merging_keeps_the_share_alpha_of_the_local_value() -> None:
    """alpha local + (1 - alpha) new."""
    expected = torch.tensor([0.875, 2.125, -3.0])
    assert torch.equal(merge(LOCAL, ANCHOR, 0.25), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_merge_are_exact_copies(alpha: float) -> None:
    """alpha 0 is the new value and alpha 1 the local one bit for bit, even where a product would not be finite."""
    local, new = torch.tensor([0.1, 3e38]), torch.tensor([0.3, float("inf")])
    wanted = new if alpha == 0 else local
    merged = merge(local, new, alpha)
    assert torch.equal(merged, wanted)
    assert merged.data_ptr() not in (local.data_ptr(), new.data_ptr())


def test_delay_correction_keeps_what_was_done_since_the_send() -> None:
    """new + (local - sent)."""
    sent = torch.tensor([0.75, 2.25, -3.0])
    assert torch.equal(merge_delay_corrected(LOCAL, ANCHOR, sent), torch.tensor([0.75, 2.25, -3.0]))


def test_rebasing_equals_having_sent_the_parameters() -> None:
    """A delta against an old base, rebased, is the delta against the new one."""
    now = torch.tensor([4.0, 4.0, 4.0])
    assert torch.equal(rebase(pseudo_gradient(ANCHOR, LOCAL), ANCHOR, now), pseudo_gradient(now, LOCAL))


def test_inputs_are_left_alone() -> None:
    """The functions are pure."""
    local, new, sent = LOCAL.clone(), ANCHOR.clone(), LOCAL.clone()
    merge(local, new, 0.5)
    merge_delay_corrected(local, new, sent)
    rebase(local, new, sent)
    pseudo_gradient(new, local)
    assert torch.equal(local, LOCAL) and torch.equal(new, ANCHOR) and torch.equal(sent, LOCAL)
