"""A worker that lies: `python -m diloco.chaos.hostile LIE worker RUN.toml ...` is `diloco worker` with another tongue.

It trains honestly and speaks the protocol; only the update that it sends is not its own. Nothing of the product
imports this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diloco.chaos.schedule import OF_LIARS
from diloco.cli import main
from diloco.comms.codec import Codec, Payload
from diloco.worker import session
from diloco.worker.replica import Replica

NAN = b"\xff"  # as every byte: NaN in the scales of each codec


class LyingCodec:
    """Encodes a lie about what it is given, and reads what others send as it is."""

    def __init__(self, inner: Codec, lie: str) -> None:
        self._inner, self._lie = inner, lie

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, tensor: Tensor, *arguments: Any, **options: Any) -> bytes:
        if self._lie == "sign_flip":
            return self._inner.encode(-tensor, *arguments, **options)
        return NAN * self._inner.wire_size(tensor.numel())

    def norm(self, payload: Payload, n: int) -> float:
        return self._inner.norm(payload, n) if self._lie == "sign_flip" else 1.0


def liar(lie: str) -> Callable[..., Replica]:
    """What makes replicas that send `lie`."""

    def make(*arguments: Any, **options: Any) -> Replica:
        replica = Replica(*arguments, **options)
        lying: list[Any] = [LyingCodec(codec, lie) for codec in replica.codecs]
        replica.codecs = lying
        return replica

    return make


if __name__ == "__main__":
    lie, *rest = sys.argv[1:]
    if lie not in OF_LIARS:
        sys.exit(f"unknown lie {lie!r}: one of {', '.join(sorted(OF_LIARS))}")
    vars(session)["Replica"] = liar(lie)
    sys.exit(main(rest))
