"""A mixture of experts for the decoder's feed-forward part: routed experts next to the block's own shared one.

Here: routing, the experts, and the load-balance loss with its way into the training loss. Not here: the decoder, the
initialisation and the sizes (model.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """sum over the k chosen experts e of weight_e out_e (silu(gate_e x) * up_e x), for x [B, T, d_model].

    Parameters: `router.weight` [E, d_model]; `gate_up` [E, 2 d_expert, d_model], rows gate then up; `out`
    [E, d_model, d_expert]. A token goes to the `k` experts of highest softmax(router x), whose weights are renormalised
    to sum 1; none is dropped. Each expert sees its tokens in one product, in token order: the same input gives the same
    bits, forward and backward, and only chosen experts cost time.

    In train mode with gradients, a forward pass leaves `balance` times the load-balance loss for `take_balance_loss`.
    """

    def __init__(self, d_model: int, d_expert: int, experts: int, k: int, balance: float) -> None:
        super().__init__()
        self.k, self.balance = k, balance
        self.router = nn.Linear(d_model, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * d_expert, d_model))
        self.out = nn.Parameter(torch.empty(experts, d_model, d_expert))
        self.pending: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        probabilities = self.router(flat).float().softmax(dim=-1)
        weights, chosen = route(probabilities, self.k)
        counts = torch.bincount(chosen.flatten(), minlength=probabilities.shape[-1])
        if self.training and torch.is_grad_enabled():
            self.pending = self.balance * load_balance(probabilities, counts)
        # A permutation of copies, not a gather with repeats: its backward adds no two numbers at one place, so that
        # no order of additions is left open.
        order = chosen.flatten().argsort(stable=True)
        copies = flat.unsqueeze(1).expand(-1, self.k, -1).flatten(0, 1)[order]
        parts = []
        shares = torch.split(copies, counts.tolist())
        for gate_up, out, mine in zip(self.gate_up, self.out, shares, strict=True):
            gate, up = F.linear(mine, gate_up).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, out))
        results = torch.cat(parts)[order.argsort()].view(-1, self.k, flat.shape[-1])
        mixed: Tensor = (results * weights.unsqueeze(-1).to(results.dtype)).sum(dim=1)
        return mixed.view(x.shape)


def route(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of probabilities [N, E], renormalised to sum 1 [N, k], and their indices [N, k]."""
    top, chosen = probabilities.topk(k, dim=-1)
    return top / top.sum(dim=-1, keepdim=True), chosen


def load_balance(probabilities: Tensor, counts: Tensor) -> Tensor:
    """E sum_e f_e P_e, scalar: f_e the share of the choices [E] that fell on e, P_e its mean probability [N, E].

    1 when either is uniform, up to E when one expert gets everything; only P has a gradient (arXiv 2101.03961, over all
    k choices).
    """
    share = counts.to(probabilities.dtype) / counts.sum()
    return counts.numel() * (share * probabilities.mean(dim=0)).sum()


def take_balance_loss(model: nn.Module) -> Tensor | None:
    """The sum of what the model's `Experts` left since the last call; None without any, as in eval mode."""
    total: Tensor | None = None
    for module in model.modules():
        if isinstance(module, Experts) and module.pending is not None:
            total = module.pending if total is None else total + module.pending
            module.pending = None
    return total
