"""Schedule-Free AdamW: the `schedulefree` library's arithmetic behind this package's rules.

The variant with a Polyak step size is in `schedule_free_plus`.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from schedulefree import AdamWScheduleFree

from diloco.errors import ConfigError
from diloco.optim.state import (
    Closure,
    EvalModeError,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    restore_exactly,
    zeros_like_state,
)
from diloco.optim.working import (
    cohorts,
    gradient_copies,
    move,
    new_state,
    with_gradient,
    working_copies,
    write_back,
)

_COUNTERS = ("step", "weight_sum", "lr_max")


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW whose evaluated weights x are an average of its iterates z (arXiv 2405.15682); keywords as the library's.

        lr_t = lr min(1, t/warmup_steps) ;  w_t = t^r lr_max^weight_lr_power ;  c_t = w_t / sum w
        v = b2 v + (1-b2) g^2 ;  d = g/(sqrt(v/(1-b2^t)) + eps) + wd y
        z = z - lr_t d ;  x = (1-c_t) x + c_t z ;  y = b1 x + (1-b1) z

    The parameters hold y in train mode, the mode it starts in, and x in eval mode. Give it no learning-rate schedule
    but `warmup_steps`. State, float32: ``z`` and ``exp_avg_sq``; numbers: ``step``, ``weight_sum``, ``lr_max``.
    The parameters themselves hold half of what x is made of, so keep them in float32: a 16-bit y rounds x too.

    Unlike the library's class it starts in train mode, leaves `p.grad` alone, keeps state in float32, and counts
    steps per parameter, so that one without gradients waits instead of ageing. `scheduled_lr` in each group is the
    last lr_t.

    Raises:
        ConfigError: unknown option, or lr, weight_decay or eps negative, betas outside [0, 1), b1 = 0 (x could not be
            recovered), negative warmup_steps.
        EvalModeError: a step in eval mode.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "foreach": foreach,
                "train_mode": True,
                "scheduled_lr": 0.0,
            },
        )

    @property
    def training(self) -> bool:
        """Whether the parameters hold y."""
        return bool(self.param_groups[0]["train_mode"])

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does, in the present mode; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "ScheduleFreeAdamW")
        if group["betas"][0] == 0:
            raise ConfigError("ScheduleFreeAdamW: betas[0] is 0: give the weight of x in y, in (0, 1)")
        if group["warmup_steps"] < 0:
            raise ConfigError(
                f"ScheduleFreeAdamW: warmup_steps is {group['warmup_steps']}: give a count of steps, 0 or more"
            )
        group["train_mode"] = self.training

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the parameters: x = y + (1 - 1/b1)(z - y). Does nothing in eval mode."""
        if self.training:
            for group in self.param_groups:
                move(group["params"], self.state, 1 - 1 / group["betas"][0])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Put y back, up to rounding: y = x + (1 - b1)(z - x). Does nothing in train mode."""
        if not self.training:
            for group in self.param_groups:
                move(group["params"], self.state, 1 - group["betas"][0])
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        if not self.training:
            raise EvalModeError(
                "ScheduleFreeAdamW.step() in eval mode, where the parameters hold the average: call train() first"
            )
        loss = evaluate(closure)
        for group in self.param_groups:
            active = with_gradient(group)
            for p in active:
                if "z" not in self.state[p]:
                    z, v = new_state(p), zeros_like_state(p)
                    self.state[p].update(z=z, exp_avg_sq=v, step=0, weight_sum=0.0, lr_max=-1.0)
            for (k, weight_sum, lr_max), params in cohorts(self.state, active, _COUNTERS):
                work = working_copies(params)
                for w, g in zip(work, gradient_copies(params), strict=True):
                    w.grad = g  # the library divides it in place
                # A passing instance over stand-ins: the library's own keeps p.grad, dtypes and counters to itself.
                own = {"k": k, "weight_sum": weight_sum, "lr_max": lr_max, "lr": float(group["lr"])}
                library = AdamWScheduleFree([{**group, **own, "params": work}])
                library.state = defaultdict(
                    dict, {w: self.state[p] for p, w in zip(params, work, strict=True)}
                )
                library.step()
                write_back(params, work)
                after = library.param_groups[0]
                for p in params:
                    self.state[p].update(
                        step=after["k"], weight_sum=after["weight_sum"], lr_max=after["lr_max"]
                    )
                group["scheduled_lr"] = after["scheduled_lr"]
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, mode included, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)
