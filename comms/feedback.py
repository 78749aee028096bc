"""Error feedback: what a lossy codec drops is kept and added to the next update (SparseLoCo 2508.15706).

One object per worker and fragment. The caller learns the fate of a message later, so the state before it is kept until
then: `commit` when it was used, `rollback` when it was rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diloco.errors import ConfigError, CorruptDataError

if TYPE_CHECKING:
    from diloco.comms.codec import Codec


class ErrorFeedback:
    """``e <- beta*e + D;  c = enc(e);  e <- e - dec(c)`` in fp32, with e = 0 at the start.

    `residual` is e (fp32 [n]), or None before the first update. beta in .9-.95 is usual, 1 is the classic form;
    outside [0, 1] raises ConfigError.
    """

    def __init__(self, codec: Codec, beta: float) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ConfigError(f"codec.ef_beta={beta!r} must lie in [0, 1]; .95 is usual")
        self.codec = codec
        self.beta = beta
        self.residual: Tensor | None = None
        self._before: Tensor | None = None
        # The memory of a residual of the past, for the next one: a fresh page costs more than the arithmetic on it.
        self._spare: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether a message is out whose fate is unknown."""
        return self._before is not None

    def encode(self, delta: Tensor, key: tuple[int, ...] = ()) -> bytes:
        """Payload of beta*e + `delta` (fp32 [n]); e becomes what the payload does not say. `key`: see `Codec.encode`.

        NonFiniteError leaves e as it was. RuntimeError while a message is pending: the fate of the last one must
        be known before e can be built upon.
        """
        if self._before is not None:
            raise RuntimeError(
                "error feedback: commit() or rollback() the last message before the next encode()"
            )
        before = torch.zeros_like(delta) if self.residual is None else self.residual
        if before.shape != delta.shape:
            raise ConfigError(
                f"error feedback: update of {delta.numel()} values, residual of {before.numel()}; "
                "a fragment keeps its size for the whole run"
            )
        spare, self._spare = self._spare, None
        after = torch.empty_like(before) if spare is None or spare.shape != before.shape else spare
        payload = self.codec.encode_rest(delta, before, self.beta, after, key)
        self.residual, self._before = after, before
        return payload

    def commit(self) -> None:
        """The message was used: forget the state before it."""
        if self._before is not None:
            self._spare, self._before = self._before, None

    def rollback(self) -> None:
        """The message was rejected: e as it was before; nothing happens if none is pending."""
        if self._before is not None:
            self._spare, self.residual, self._before = self.residual, self._before, None

    def recover(self, delta: Tensor, share: float) -> None:
        """``e <- e + share * delta``: work that is lost otherwise. RuntimeError while a message is pending."""
        if self._before is not None:
            raise RuntimeError("error feedback: commit() or rollback() the last message before recover()")
        kept = torch.zeros_like(delta) if self.residual is None else self.residual
        self.residual = kept + delta * share

    def state_dict(self) -> dict[str, Tensor]:
        """`residual`, and `before` while a message is pending; empty before the first update."""
        state = {"residual": self.residual, "before": self._before}
        return {key: value for key, value in state.items() if value is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over (a copy of) what `state_dict` gave; CorruptDataError for anything else."""
        unknown = state.keys() - {"residual", "before"}
        if unknown or ("before" in state and "residual" not in state):
            raise CorruptDataError(
                f"error feedback state has keys {sorted(state)}, want residual and maybe before"
            )
        for key, value in state.items():
            if value.dtype != torch.float32 or value.shape != state["residual"].shape or value.dim() != 1:
                raise CorruptDataError(
                    f"error feedback {key} is {value.dtype} {tuple(value.shape)}, want float32 [n]"
                )
        self.residual = state["residual"].clone() if "residual" in state else None
        self._before = state["before"].clone() if "before" in state else None
