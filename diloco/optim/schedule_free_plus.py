"""ScheduleFree+: Schedule-Free AdamW that takes its step size from the loss. No communication but the optional hook."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diloco.errors import ConfigError, NonFiniteError
from diloco.optim.sharded import locals_of, whole
from diloco.optim.state import (
    Closure,
    EvalModeError,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    gradient,
    restore_exactly,
    zeros_like_state,
)
from diloco.optim.working import cohorts, move, new_state, with_gradient, working_copies, write_back

_COUNTERS = ("step", "weight_sum", "lr_max", "beta")


class ScheduleFreePlus(torch.optim.Optimizer):
    """Schedule-Free with momentum, decay scaled by the squared step, and a Polyak step size (arXiv 2605.19095).

        1-b_k = (1-beta)^(1-q) (1-beta_max)^q ;  q = min(k/anneal_steps, 1) ;  k = t-1
        a_t = lr max(0, F + I)/e ;  I = b_k sum <g, z-x> ;  e = EMA of sqrt(pi/2) ||g||_1, over all parameters
        z = z - a_t^2 wd y - a_t mhat/(sqrt(vhat)+eps)
        x = (1-c_t) x + c_t z ;  y = b_k x + (1-b_k) z

    F is the mean loss at y: the closure's value, or `loss` for a loop that has run backward itself. w_t = t^r
    lr_max^weight_lr_power with lr_max the largest a_t, c_t = w_t / sum w, and c_t = 1 without weight in the first
    `c_warmup` steps. ``anneal_steps=0`` keeps b at `beta`. `lr` is 1 or a warm-up to it; `weight_decay` is 20-50
    where AdamW has 0.1. `l1_decay` is the EMA's (0: this step's norm alone, bias corrected otherwise).

    F and the sums belong to the whole model and batch. `all_reduce` gets them as one tensor ``[F, I, ||g||_1]`` and
    returns (or leaves in place) the global ones. ``reduce=True`` uses torch.distributed's default group, if there is
    one: the mean over ranks, or with `sharded` (each rank holds other parameters) the mean of F and the sums of the rest.

    The parameters hold y in train mode, the mode it starts in, and x in eval mode. State, float32: ``z``,
    ``exp_avg``, ``exp_avg_sq``; numbers: ``step``, ``weight_sum``, ``lr_max``, ``beta`` (b of the present y); per
    group ``k`` and ``l1_ema``. Steps are counted per parameter, annealing per optimizer.

    Raises:
        ConfigError: unknown option or value out of range; a step without a loss, or with two.
        EvalModeError: a step in eval mode.
        NonFiniteError: loss or gradients are not finite; nothing has changed then.
    """

    needs_loss = True  # loops call ``step(loss=...)``

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        beta: float = 0.9,
        beta_max: float = 0.965,
        anneal_steps: int = 0,
        weight_decay: float = 0.0,
        c_warmup: int = 0,
        *,
        eps: float = 1e-8,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        l1_decay: float = 0.0,
        all_reduce: Callable[[Tensor], Tensor | None] | None = None,
        reduce: bool = False,
        sharded: bool = False,
    ) -> None:
        if not 0 <= l1_decay < 1:
            raise ConfigError(f"ScheduleFreePlus: l1_decay is {l1_decay}: give a number in [0, 1)")
        if all_reduce is not None and reduce:
            raise ConfigError("ScheduleFreePlus: all_reduce and reduce are both given: use one of them")
        if sharded and not reduce:
            raise ConfigError("ScheduleFreePlus: sharded is True without effect: give reduce=True as well")
        self.l1_decay = l1_decay
        self.all_reduce = all_reduce
        if reduce:
            self.all_reduce = _over_shards if sharded else _over_replicas
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "beta": beta,
                "beta_max": beta_max,
                "anneal_steps": anneal_steps,
                "weight_decay": weight_decay,
                "c_warmup": c_warmup,
                "eps": eps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "train_mode": True,
                "k": 0,
                "l1_ema": 0.0,
                "scheduled_lr": 0.0,
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "l1_decay": self.l1_decay, "all_reduce": self.all_reduce}

    @property
    def training(self) -> bool:
        """Whether the parameters hold y."""
        return bool(self.param_groups[0]["train_mode"])

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does, in the present mode; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "ScheduleFreePlus")
        for key in ("beta", "beta_max"):
            if not 0 < group[key] < 1:
                raise ConfigError(
                    f"ScheduleFreePlus: {key} is {group[key]}: give the weight of x in y, in (0, 1)"
                )
        for key in ("anneal_steps", "c_warmup"):
            if group[key] < 0:
                raise ConfigError(
                    f"ScheduleFreePlus: {key} is {group[key]}: give a count of steps, 0 or more"
                )
        group.update({key: self.param_groups[0][key] for key in ("train_mode", "k", "l1_ema")})

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the parameters: x = y + (1 - 1/b)(z - y). Does nothing in eval mode."""
        if self.training:
            self._move(lambda b: 1 - 1 / b, False)

    @torch.no_grad()
    def train(self) -> None:
        """Put y back, up to rounding: y = x + (1 - b)(z - x). Does nothing in train mode."""
        if not self.training:
            self._move(lambda b: 1 - b, True)

    def _move(self, weight: Callable[[float], float], train_mode: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    move([p], self.state, weight(self.state[p]["beta"]))
            group["train_mode"] = train_mode

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, loss: float | Tensor | None = None
    ) -> float | Tensor:
        """One update of every parameter that has a gradient; returns this process's loss."""
        if not self.training:
            raise EvalModeError(
                "ScheduleFreePlus.step() in eval mode, where the parameters hold the average: call train() first"
            )
        if closure is not None and loss is not None:
            raise ConfigError("ScheduleFreePlus.step() got a closure and a loss: give one of them")
        value = loss if closure is None else evaluate(closure)
        if value is None:
            raise ConfigError(
                "ScheduleFreePlus.step() got no loss, which sets its step size: pass a closure that returns it, or loss="
            )
        active = [(group, with_gradient(group)) for group in self.param_groups]
        betas = [annealed(g["beta"], g["beta_max"], g["k"], g["anneal_steps"]) for g in self.param_groups]
        polyak = self._polyak(value, active, betas)
        for (group, params), b in zip(active, betas, strict=True):
            group["scheduled_lr"] = float(group["lr"]) * polyak
            for p in params:
                if "z" not in self.state[p]:
                    self.state[p].update(
                        z=new_state(p), exp_avg=zeros_like_state(p), exp_avg_sq=zeros_like_state(p)
                    )
                    self.state[p].update(step=0, weight_sum=0.0, lr_max=0.0, beta=b)
            for counters, cohort in cohorts(self.state, params, _COUNTERS):
                self._update(group, cohort, counters, b)
            group["k"] += 1
        return value

    def _polyak(
        self, value: float | Tensor, active: list[tuple[ParamGroup, list[Tensor]]], betas: list[float]
    ) -> float:
        """max(0, F + I)/e from this step's loss and gradients; 0 where the gradient is 0. Advances the EMA."""
        params = [p for _, ps in active for p in ps]
        device = params[0].device if params else torch.device("cpu")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        inner: list[Tensor] = []
        l1: list[Tensor] = []
        for (_, ps), b in zip(active, betas, strict=True):
            for p in ps:
                g = gradient(p)
                l1.append(whole(torch.linalg.vector_norm(g, 1)))
                if "z" in self.state[p]:  # z - x is (z - y)/b with the b that made this y
                    z_y = self.state[p]["z"] - p
                    inner.append((b / self.state[p]["beta"]) * whole(z_y.mul_(g).sum()))
        zero = torch.zeros((), dtype=dtype, device=device)
        sums = [torch.stack([s.to(zero) for s in (zero, *part)]).sum() for part in (inner, l1)]
        totals = torch.stack([torch.as_tensor(value, dtype=dtype, device=device).detach(), *sums])
        if self.all_reduce is not None:
            reduced = self.all_reduce(totals)
            totals = totals if reduced is None else reduced
        F, I, norm = totals.tolist()  # the one wait for the device
        if not (math.isfinite(F) and math.isfinite(I) and math.isfinite(norm)):
            raise NonFiniteError(
                f"ScheduleFreePlus: loss {F}, inner product {I}, gradient norm {norm}: all must be finite; "
                "skip the step or lower lr"
            )
        first = self.param_groups[0]
        ema = self.l1_decay * first["l1_ema"] + (1 - self.l1_decay) * norm * math.sqrt(math.pi / 2)
        for group in self.param_groups:
            group["l1_ema"] = ema
        e = ema / (1 - self.l1_decay ** (first["k"] + 1))
        return max(0.0, F + I) / e if e > 0 else 0.0

    def _update(
        self, group: ParamGroup, params: list[Tensor], counters: tuple[int, float, float, float], b: float
    ) -> None:
        k, weight_sum, lr_max, b_before = counters
        t, a = k + 1, group["scheduled_lr"]
        b1, b2 = group["betas"]
        lr_max = max(lr_max, a)
        if k < group["c_warmup"]:
            c = 1.0
        else:
            weight = t ** group["r"] * lr_max ** group["weight_lr_power"]
            weight_sum += weight
            c = weight / weight_sum if weight_sum else 1.0  # no weight: no step was taken, x = z
        work = working_copies(params)
        y, grads = locals_of(work), locals_of([gradient(p) for p in params])
        z, m, v = (locals_of([self.state[p][key] for p in params]) for key in ("z", "exp_avg", "exp_avg_sq"))

        x = torch._foreach_lerp(y, z, 1 - 1 / b_before)
        if group["weight_decay"]:
            torch._foreach_add_(z, y, alpha=-a * a * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
        denominator = torch._foreach_div(v, 1 - b2**t)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(z, m, denominator, value=-a / (1 - b1**t))
        torch._foreach_lerp_(x, z, c)
        torch._foreach_lerp_(x, z, 1 - b)
        torch._foreach_copy_(y, x)
        write_back(params, work)
        for p in params:
            self.state[p].update(step=t, weight_sum=weight_sum, lr_max=lr_max, beta=b)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, mode included, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)


def annealed(beta: float, beta_max: float, k: int, steps: int) -> float:
    """b with ``1-b = (1-beta)^(1-q) (1-beta_max)^q``, q = min(k/steps, 1); `beta` where `steps` is 0."""
    if steps == 0:
        return beta
    q = min(k / steps, 1.0)
    return float(1 - (1 - beta) ** (1 - q) * (1 - beta_max) ** q)


def _over_replicas(totals: Tensor) -> Tensor:
    """Every rank has the same gradients and its own loss: the mean of each, so that all take the same step."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
        totals /= dist.get_world_size()
    return totals


def _over_shards(totals: Tensor) -> Tensor:
    """Every rank has the gradients of its own parameters: the mean loss, and sums over the shards."""
    if dist.is_available() and dist.is_initialized():
        totals[0] /= dist.get_world_size()
        dist.all_reduce(totals)
    return totals
