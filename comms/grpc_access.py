"""Who may call the coordinator: the gate before every call, with TLS and without. And what a peer is told.

With keys each call, of whatever service, needs a certificate of the run's CA that is neither revoked nor expired:
workers may train in their own name, operators may read the status, coordinators follow one another. TLS itself has
checked the signature.
"""

from __future__ import annotations

import contextlib
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from diloco.comms import grpc_options as options
from diloco.comms import tls
from diloco.comms.audit import Audit
from diloco.comms.grpc_options import aio, grpc
from diloco.comms.limits import Budgets
from diloco.comms.revocation import Revocations
from diloco.comms.tls import Identity, Keys
from diloco.comms.transfer import FencedError, OutOfPlaceError, TooLargeError
from diloco.comms.uploads import QuotaError
from diloco.errors import CorruptDataError, DilocoError, RefusedError

Context = aio.ServicerContext[bytes, bytes]

# Joins per identity, or without TLS per host: at once, and per second in the long run.
JOINS = (20.0, 0.5)
JOINS_PER_HOST = (500.0, 50.0)

_FOR_COORDINATORS = (options.FOLLOW, options.FETCH_BLOB)
_FOR_EVERYBODY = (options.GET_STATUS, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")


class NoSessionError(DilocoError):
    """A transfer without a live session."""


class NotOfferedError(DilocoError):
    """A download of something that is not in the outbox."""


class ForbiddenError(DilocoError):
    """The peer is not who it says, or may not do this."""


class TooManyError(DilocoError):
    """The peer does this too often: later perhaps."""


# What a peer is told, most special first: its client decides by the code whether to try again.
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (TooLargeError, grpc.StatusCode.INVALID_ARGUMENT),
    (NoSessionError, grpc.StatusCode.UNAUTHENTICATED),
    (NotOfferedError, grpc.StatusCode.NOT_FOUND),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TooManyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (FencedError, grpc.StatusCode.ABORTED),
    (OutOfPlaceError, grpc.StatusCode.OUT_OF_RANGE),
    (CorruptDataError, grpc.StatusCode.DATA_LOSS),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)


@contextlib.asynccontextmanager
async def refusals(context: Context) -> AsyncIterator[None]:
    """Turns the exceptions above into the status of the call."""
    try:
        yield
    except (DilocoError, TimeoutError) as error:
        code = next((c for kind, c in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
        await context.abort(code, str(error) or "no progress for too long")


class Access:
    """Decides; `keys` None means that everybody who can reach the port may do everything."""

    def __init__(self, keys: Keys | None, audit: Audit) -> None:
        self.audit = audit
        self._revoked = Revocations(keys.folder / tls.REVOKED) if keys is not None else None
        self._joins = Budgets(*(JOINS_PER_HOST if keys is None else JOINS))

    def caller(self, context: Context) -> Identity | None:
        """Who calls; None without TLS. Raises ForbiddenError."""
        if self._revoked is None:
            return None
        shown = (context.auth_context() or {}).get("x509_pem_cert")
        if not shown:
            raise ForbiddenError("no certificate")
        try:
            identity = tls.identity_of(bytes(next(iter(shown))))
        except RefusedError as error:
            raise ForbiddenError(str(error)) from None
        if (why := self.barred(identity)) is not None:
            raise ForbiddenError(why)
        return identity

    def barred(self, identity: Identity) -> str | None:
        """Why a certificate that was good once is not any more."""
        if self._revoked is not None and identity.serial in self._revoked:
            return f"the certificate of the {identity} has been revoked"
        if time.time() > identity.ends:
            return f"the certificate of the {identity} has expired on {tls.day(identity.ends)}: renew it"
        return None

    def check(self, method: str, context: Context) -> None:
        """The gate. Raises ForbiddenError."""
        identity = self.caller(context)
        if identity is None or method in _FOR_EVERYBODY:
            return
        if method in _FOR_COORDINATORS:
            if identity.role != "coordinator":
                raise ForbiddenError(f"the {identity} is no coordinator: only one can be a standby")
        elif identity.role != "worker":
            raise ForbiddenError(f"the {identity} may read the status and nothing else")

    def check_join(self, worker: str, context: Context) -> Identity | None:
        """Whether the caller may join as `worker`, once more. Raises ForbiddenError, TooManyError."""
        identity = self.caller(context)
        if identity is not None and identity.name != worker:
            raise ForbiddenError(
                f"the certificate is that of the {identity}, the worker calls itself {worker!r}: start it with "
                f"--id {identity.name}, or with keys of its own (diloco keys worker {worker[:64]})"
            )
        if not self._joins.take(self.peer(context)):
            raise TooManyError("too many joins from there: later again")
        return identity

    def peer(self, context: Context) -> str:
        """The identity, or without TLS the host, of a caller that has passed the gate."""
        identity = self.caller(context)
        return host_of(context) if identity is None else str(identity)

    def refresh(self) -> None:
        """Look whether the list of revoked certificates has changed."""
        if self._revoked is not None:
            self._revoked.refresh()

    def refused(self, context: Context, why: str, worker: str = "") -> None:
        facts = {"worker": worker} if worker else {}
        with contextlib.suppress(ForbiddenError):
            if (identity := self.caller(context)) is not None:
                facts["certificate"] = str(identity)
        self.audit.write("refused", host=host_of(context), reason=why, **facts)


class Gate(aio.ServerInterceptor):
    """Asks `access` before every call, also of services that know nothing of it."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind, None)
            if behaviour is not None:
                return handler._replace(**{kind: self._guarded(method, behaviour)})
        return handler

    def _guarded(self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def guarded(request: Any, context: Context) -> Any:
            async with refusals(context):
                try:
                    self._access.check(method, context)
                except ForbiddenError as error:
                    self._access.refused(context, f"{method}: {error}")
                    raise
            return await behaviour(request, context)

        return guarded


def host_of(context: Context) -> str:
    """The address a call comes from, without the port, which is another one each time."""
    peer = urllib.parse.unquote(context.peer())  # ipv4:127.0.0.1:5, ipv6:[::1]:5, unix:
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
