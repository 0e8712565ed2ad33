"""Error classes as gRPC status codes and back: the one table. Must not decide what to do about an error."""

from __future__ import annotations

from typing import Final

import grpc

from backstay import errors
from backstay.errors import BackstayError, UnavailableError
from backstayd.printable import printable

REASON_KEY: Final = "backstay-reason"
LEADER_KEY: Final = "backstay-leader"  # host:port of the coordinator that leads, where one that does not was asked
NOT_LEADER: Final = "not_leader"


class NotLeaderError(UnavailableError):
    """This coordinator does not lead; ``leader`` is the address of the one that does, or "" if none is known."""

    def __init__(self, message: str, *, leader: str = "") -> None:
        super().__init__(message, reason=NOT_LEADER)
        self.leader = leader


CODE_OF_CLASS: Final[dict[type[BackstayError], grpc.StatusCode]] = {
    errors.BackstayError: grpc.StatusCode.UNKNOWN,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StaleGenerationError: grpc.StatusCode.ABORTED,
    errors.SnapshotNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.IntegrityError: grpc.StatusCode.DATA_LOSS,
    errors.UnrecoverableError: grpc.StatusCode.OUT_OF_RANGE,
    errors.InvariantError: grpc.StatusCode.INTERNAL,
}

# Codes that gRPC itself makes: nobody answered in time, or the call was cut.
_CLASS_OF_CODE: Final[dict[grpc.StatusCode, type[BackstayError]]] = {
    **{code: cls for cls, code in CODE_OF_CLASS.items()},
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: errors.ConfigError,
}


def code_of(error: BackstayError) -> grpc.StatusCode:
    """The status code of the nearest class of ``error`` in the table."""
    for cls in type(error).__mro__:
        if cls in CODE_OF_CLASS:
            return CODE_OF_CLASS[cls]
    return grpc.StatusCode.UNKNOWN


def class_of(code: grpc.StatusCode) -> type[BackstayError]:
    """The error class a caller raises for ``code``."""
    return _CLASS_OF_CODE.get(code, BackstayError)


def error_of(call: grpc.RpcError, *, asked: str) -> BackstayError:
    """The error of a failed call, with ``asked`` (what was asked of whom) in front of the other side's words."""
    if not isinstance(call, (grpc.Call, grpc.aio.AioRpcError)):
        return BackstayError(f"{asked}: {call}")
    code = call.code()
    told = {str(key): str(value) for key, value in call.trailing_metadata() or ()}
    reason = told.get(REASON_KEY, "")
    message = f"{asked}: {printable(call.details() or code.name.lower().replace('_', ' '))}"
    if reason == NOT_LEADER:
        return NotLeaderError(message, leader=told.get(LEADER_KEY, ""))
    return class_of(code)(message, reason=reason)


def is_nobodys_answer(call: grpc.RpcError) -> bool:
    """Whether gRPC itself failed the call: nobody was reached, or nobody answered in time."""
    if not isinstance(call, (grpc.Call, grpc.aio.AioRpcError)):
        return True
    is_ours = any(key == REASON_KEY for key, _ in call.trailing_metadata() or ())
    return not is_ours and class_of(call.code()) is UnavailableError
