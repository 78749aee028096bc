"""A fragment's outer step and the frame that answers with it, in one pass over memory where one kernel does both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diloco.comms.feedback import ErrorFeedback
from diloco.comms.payload import flat, to_bytes
from diloco.errors import NonFiniteError
from diloco.kernels import ops
from diloco.outer import Gpa, Nesterov, OuterOptimizer, OuterShard, Sgd, SgdM


def requantised(
    shard: OuterShard, mean: Tensor, feedback: ErrorFeedback, key: tuple[int, ...]
) -> bytes | None:
    """``u = step(mean); e += u; c = enc(e); e -= dec(c); params -= dec(c)``; the payload c, the version one higher.

    The same bits as one after the other. None, and nothing has happened, where the optimizer or the codec has no such
    kernel. NonFiniteError when the step overflows fp32; the shard is spoilt then.
    """
    rule, options = _rule(shard.optimizer), getattr(feedback.codec, "on_kernels", None)
    if rule is None or options is None or feedback.beta != 1.0 or feedback.pending:
        return None
    if feedback.residual is None:
        feedback.residual = torch.zeros_like(shard.params)
    name, states, (lr, momentum, mu_y) = rule
    made = ops.outer_step(
        name,
        flat(shard.params),
        mean,
        [shard.state[one] for one in states],
        lr=lr,
        momentum=momentum,
        mu_y=mu_y,
        residual=feedback.residual,
        **options(key),
    )
    assert made is not None
    if math.isnan(float(made.squared_norm)):
        raise NonFiniteError("the outer step overflows fp32")
    shard.version += 1
    return to_bytes(made.payload)


def _rule(optimizer: OuterOptimizer) -> tuple[str, tuple[str, ...], tuple[float, float, float]] | None:
    """The step as `ops.outer_step` takes it: its name, its state, lr, momentum and mu_y."""
    match optimizer:
        case Sgd():
            return "sgd", (), (optimizer.lr, 0.0, 0.0)
        case SgdM():
            return "sgdm", ("momentum",), (optimizer.lr, optimizer.momentum, 0.0)
        case Nesterov():
            return "nesterov", ("momentum",), (optimizer.lr, optimizer.momentum, 0.0)
        case Gpa():
            return "gpa", ("x", "z"), (optimizer.lr, optimizer.mu_x, optimizer.mu_y)
    return None
