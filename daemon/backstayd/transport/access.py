"""Which role may call what at the coordinator, checked from the caller's certificate before the call is looked at.

A service or method that is not listed is open to nobody. Must not know what calls do.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import grpc

from backstay.errors import BackstayError, ConfigError, InvariantError
from backstayd.security.certificate import Certificate, read_pem
from backstayd.security.handshakes import Handshakes
from backstayd.security.identity import Identity, Role, authorise, identify, shown
from backstayd.security.refusals import Refusals
from backstayd.transport import errors

logger = logging.getLogger(__name__)

_SERVICE_ROLES: Final[dict[str, frozenset[Role]]] = {
    "backstayd.v1.CoordinatorService": frozenset({Role.NODE}),
    "backstayd.v1.OperatorService": frozenset({Role.OPERATOR, Role.COORDINATOR}),
}
# What reads: a node asks on behalf of those who read its status, or a snapshot of a run that is theirs.
_ALSO: Final[dict[str, frozenset[Role]]] = {
    "/backstayd.v1.OperatorService/GetStatus": frozenset({Role.NODE}),
    "/backstayd.v1.OperatorService/Locate": frozenset({Role.NODE}),
}


def roles_of(method: str) -> frozenset[Role]:
    """Who may call ``/package.Service/Method``."""
    return _SERVICE_ROLES.get(method.split("/")[1] if method.count("/") == 2 else "", frozenset()) | _ALSO.get(
        method, frozenset()
    )


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate is not of a role that may call."""

    def __init__(self, trust_domain: str, handshakes: Handshakes) -> None:
        self._trust_domain = trust_domain
        self._handshakes = handshakes
        self._refusals = Refusals(logger)

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        if handler.stream_stream is not None:
            behaviour, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
        elif handler.unary_unary is not None:
            behaviour, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        else:
            raise InvariantError(f"{method} is of a kind that is not checked")

        async def checked(request: Any, context: Any) -> Any:
            await self._check(method, context)
            return await behaviour(request, context)

        return make(checked, handler.request_deserializer, handler.response_serializer)

    async def _check(self, method: str, context: Any) -> None:
        self._handshakes.note_call(str(context.peer()))
        try:
            authorise(identity_of(context, self._trust_domain), roles_of(method), doing=f"call {method[1:]}")
        except BackstayError as error:
            self._refusals.note(f"{host_of(context)}: {error}")
            await context.abort(errors.code_of(error), str(error), ((errors.REASON_KEY, error.reason),))


def identity_of(context: Any, trust_domain: str) -> Identity:
    """Whom the caller's certificate names; raises ConfigError."""
    return identify(certificate_of(context).uris, trust_domain=trust_domain)


def certificate_of(context: Any) -> Certificate:
    """The caller's certificate, from its bytes: of what gRPC reads out of it, names end at a zero byte."""
    pems = context.auth_context().get("x509_pem_cert", ())
    if len(pems) != 1:
        raise ConfigError("the connection shows no certificate", reason="no_identity")
    return read_pem(pems[0])


def check_name(context: Any, trust_domain: str, name: str) -> None:
    """Raise ConfigError unless the caller's certificate is that of the node called ``name``."""
    identity = identity_of(context, trust_domain)
    if identity.name != name:
        raise ConfigError(
            f"node {shown(name)} reports with the certificate of {identity}; a certificate must be made for the name "
            "that the node has (--name)",
            reason="wrong_name",
        )


def host_of(context: Any) -> str:
    """The caller's address without its port."""
    return str(context.peer()).partition(":")[2].rpartition(":")[0]
