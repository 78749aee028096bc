"""The one asyncio loop of this process, in a daemon thread that lives as long as the process.

grpc.aio works reliably with a single loop per process, so the server and all connections share this one. What
runs on it must never block.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process id: threads do not survive a fork


def shared_loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="diloco-comms", daemon=True).start()
            _loops[os.getpid()] = loop
        return loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` on the shared loop and wait for its result; not to be called from that loop's thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, shared_loop()).result()
