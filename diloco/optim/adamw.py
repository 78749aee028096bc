"""AdamW with a choice of weight decay, on torch's own kernels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from diloco.errors import ConfigError, nearest
from diloco.optim.state import (
    Closure,
    ParamGroup,
    Params,
    StateDict,
    check_group,
    evaluate,
    gradient,
    restore_exactly,
    zeros_like_state,
)
from diloco.optim.working import with_gradient, working_copies, write_back

Decay = Literal["decoupled", "adamc", "cautious"]
_DECAYS = ("decoupled", "adamc", "cautious")
_FUSED = ("cpu", "cuda", "xpu")


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update with float32 state and three kinds of decay.

        m = b1 m + (1-b1) g ;  v = b2 v + (1-b2) g^2
        decoupled   p = p (1 - lr wd)
        adamc       p = p (1 - lr^2/lr_max wd)                     (arXiv 2506.02285)
        cautious    p = p (1 - lr wd) where m and p agree in sign  (arXiv 2510.12402)
        p = p - lr (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)

    `lr_max` is the peak of the schedule: the group's lr when it is added, which schedulers scale down, unless given.
    adamc equals decoupled decay while lr = lr_max; use it for weights directly followed by a normalisation.
    m has the sign of the update, so cautious decay asks for update * p >= 0.

    Every keyword is also a group option, read anew at each step: a schedule may write ``group["betas"]``, and the
    bias correction then uses the present beta, 1 - b2^t, as torch does. `fused` None takes the fused kernel where
    there is one. State: float32 ``exp_avg``, ``exp_avg_sq`` and torch's ``step``; a state of torch.optim.AdamW
    loads, and goes on with decoupled decay.

    Raises:
        ConfigError: unknown option or kind of decay, a value out of range, adamc without a positive peak.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        decay: Decay = "decoupled",
        lr_max: float | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decay": decay,
                "lr_max": lr_max,
                "fused": fused,
            },
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, self.defaults, "AdamW")
        if group["decay"] not in _DECAYS:
            raise ConfigError(
                f"AdamW: decay is {group['decay']!r}: known are {', '.join(_DECAYS)}{nearest(str(group['decay']), _DECAYS)}"
            )
        if group["lr_max"] is None:
            group["lr_max"] = float(group["lr"])
        if group["decay"] == "adamc" and not group["lr_max"] > 0:
            raise ConfigError(
                f"AdamW: lr_max is {group['lr_max']}: adamc divides by the peak lr; give lr_max, above 0"
            )
        _choose_kernel(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decay", "decoupled")
            group.setdefault("lr_max", float(group.get("initial_lr", group["lr"])))
            _choose_kernel(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of the saved state, every tensor in its saved dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self.state[p]["step"] = self.state[p]["step"].to(_step_device(p, group))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params = with_gradient(group)
            if not params:
                continue
            for p in params:
                if "step" not in self.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=_step_device(p, group))
                    self.state[p].update(
                        step=step, exp_avg=zeros_like_state(p), exp_avg_sq=zeros_like_state(p)
                    )
            work = working_copies(params)
            grads = [gradient(p) for p in params]
            # Fused kernels walk all tensors in memory order, whatever their strides.
            fused = group["fused"] and all(w.is_contiguous() for w in work)
            if fused:
                grads = [g.contiguous() for g in grads]
            m, v, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
            lr, decay = float(group["lr"]), group["weight_decay"]
            if group["decay"] == "adamc":
                decay *= lr / group["lr_max"]
            elif group["decay"] == "cautious" and decay:
                _decay_cautiously(
                    work, list(torch._foreach_lerp(m, grads, 1 - group["betas"][0])), lr * decay
                )
                decay = 0.0
            adamw(
                work,
                grads,
                m,
                v,
                [],
                steps,
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=lr,
                weight_decay=decay,
                eps=group["eps"],
                maximize=False,
            )
            write_back(params, work)
        return loss


def _decay_cautiously(work: list[Tensor], m: list[Tensor], decay: float) -> None:
    """``w = w (1 - decay)`` where sign(m) w >= 0. `m`, the moment this step will use, is overwritten."""
    torch._foreach_sign_(m)  # a product of small numbers could underflow to 0, which counts as agreement
    torch._foreach_mul_(m, work)
    for w, agreement in zip(work, m, strict=True):
        w.sub_(w * (agreement >= 0), alpha=decay)


def _choose_kernel(group: ParamGroup) -> None:
    if group.get("fused") is None:
        group["fused"] = all(p.device.type in _FUSED for p in group["params"])


def _step_device(p: Tensor, group: ParamGroup) -> torch.device:
    """Where torch keeps the step counter: with the parameter for fused kernels, on the CPU otherwise."""
    return p.device if group["fused"] else torch.device("cpu")
