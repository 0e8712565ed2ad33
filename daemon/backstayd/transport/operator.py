"""The operator's side of the coordinator: synchronous calls with a deadline. Must not interpret the status document."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self

import grpc

from backstay import record
from backstay.errors import IntegrityError, UnavailableError
from backstayd.core.locating import Located
from backstayd.transport import errors
from backstayd.transport.channel import channel_options
from backstayd.v1 import operator_pb2, operator_pb2_grpc


class OperatorClient:
    """Calls to the coordinator at ``address`` (``host:port``), each answered within ``timeout_s`` or UnavailableError."""

    def __init__(self, address: str, *, timeout_s: float = 5.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=channel_options(timeout_s))
        self._stub = operator_pb2_grpc.OperatorServiceStub(self._channel)

    def get_status(self) -> dict[str, Any]:
        """The status document, as plain JSON values."""
        try:
            response = self._stub.GetStatus(operator_pb2.GetStatusRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._error(error, asked="read the status") from error
        document = json.loads(response.document_json)
        if not isinstance(document, dict):
            raise IntegrityError(f"the coordinator at {self.address} answered a status that is not an object")
        return document

    def forget(self, run: str) -> None:
        """Delete everything of ``run`` on every node; SnapshotNotFoundError if no node knows it."""
        try:
            self._stub.Forget(operator_pb2.ForgetRequest(run=run), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._error(error, asked=f"forget {run}") from error

    def distrust(self, run: str, step: int, reason: str) -> str:
        """Have ``step`` never restored again; returns what a restart would do now."""
        request = operator_pb2.DistrustRequest(run=run, step=step, reason=reason)
        try:
            return str(self._stub.Distrust(request, timeout=self._timeout_s).message)
        except grpc.RpcError as error:
            raise self._error(error, asked=f"distrust step {step} of {run}") from error

    def trust(self, run: str) -> int:
        """Take back every distrust of ``run``; returns how many snapshots were distrusted."""
        try:
            return int(self._stub.Trust(operator_pb2.TrustRequest(run=run), timeout=self._timeout_s).count)
        except grpc.RpcError as error:
            raise self._error(error, asked=f"trust {run}") from error

    def locate(self, run: str, step: int) -> Located:
        """Where the shards of a complete snapshot are; 0: the newest. Raises what the coordinator answers."""
        request = operator_pb2.LocateRequest(run=run, step=step)
        try:
            response = self._stub.Locate(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._error(error, asked=f"find step {step or 'newest'} of {run}") from error
        return record.loads(Located, response.document_json)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, call: grpc.RpcError, *, asked: str) -> Exception:
        error = errors.error_of(call, asked=f"cannot {asked} at coordinator {self.address}")
        if not isinstance(error, UnavailableError):
            return error
        return UnavailableError(
            f"no coordinator answers at {self.address} (a call may take {self._timeout_s:g} s); is `backstayd coordinator` "
            f"running there? ({error})",
            reason="no_coordinator",
        )
