"""The operator's side of the coordinator: synchronous calls with a deadline, to the one of several that leads.

Must not interpret the status document. Every call may be repeated without harm, so it is, until the deadline.
"""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any, Final, Self

import grpc

from backstay.errors import BackstayError, ConfigError, IntegrityError, UnavailableError
from backstay.format import json_records
from backstayd.addresses import split_address
from backstayd.core.recover.locate import Located
from backstayd.security import probe
from backstayd.security.credentials import Credentials
from backstayd.transport import errors
from backstayd.transport.address_book import AddressBook, Target, resolve_blocking
from backstayd.transport.channel import open_blocking_channel
from backstayd.v1 import operator_pb2, operator_pb2_grpc

PAUSE_S: Final = 0.2  # between two rounds over all addresses
SHORTEST_TRY_S: Final = 0.5


class OperatorClient:
    """Calls to the coordinator that leads, each answered within ``timeout_s`` or UnavailableError.

    Args:
        addresses: ``host:port``, or several separated by commas; a name may stand for several machines.
        credentials: None speaks plaintext.
    """

    def __init__(self, addresses: str, *, timeout_s: float = 5.0, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._number = 0  # of the certificate that the channels were opened with
        self._refusal: UnavailableError | None = None  # what TLS has against it, of any address
        self.address = addresses
        self._timeout_s = timeout_s
        self._book = AddressBook(addresses)
        self._leader: Target | None = None
        self._channels: dict[str, grpc.Channel] = {}

    def get_status(self, *, is_brief: bool = False) -> dict[str, Any]:
        """The status document, as plain JSON values; ``is_brief``: without what there is of each rank, where it is known."""
        response = self._call("GetStatus", operator_pb2.GetStatusRequest(is_brief=is_brief), asked="read the status")
        document = json.loads(response.document_json)
        if not isinstance(document, dict):
            raise IntegrityError(f"the coordinator at {self.address} answered a status that is not an object")
        return document

    def forget(self, run: str) -> None:
        """Delete everything of ``run`` on every node; SnapshotNotFoundError if no node knows it."""
        self._call("Forget", operator_pb2.ForgetRequest(run=run), asked=f"forget {run}")

    def distrust(self, run: str, step: int, reason: str) -> str:
        """Have ``step`` never restored again; returns what a restart would do now."""
        request = operator_pb2.DistrustRequest(run=run, step=step, reason=reason)
        return str(self._call("Distrust", request, asked=f"distrust step {step} of {run}").message)

    def trust(self, run: str) -> int:
        """Take back every distrust of ``run``; returns how many snapshots were distrusted."""
        return int(self._call("Trust", operator_pb2.TrustRequest(run=run), asked=f"trust {run}").count)

    def drain(self, node: str, *, undo: bool) -> tuple[str, str]:
        """Have ``node`` drained, or not any more; returns its state ("", "draining" or "safe") and a sentence."""
        request = operator_pb2.DrainRequest(node=node, undo=undo)
        response = self._call("Drain", request, asked=f"{'stop draining' if undo else 'drain'} {node}")
        return str(response.state), str(response.reason)

    def locate(self, run: str, step: int) -> Located:
        """Where the shards of a complete snapshot are; 0: the newest. Raises what the coordinator answers."""
        request = operator_pb2.LocateRequest(run=run, step=step)
        response = self._call("Locate", request, asked=f"find step {step or 'newest'} of {run}")
        return json_records.loads(Located, response.document_json)

    def close(self) -> None:
        """Close the channels; idempotent."""
        for channel in self._channels.values():
            channel.close()
        self._channels = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, request: Any, *, asked: str) -> Any:
        """The leader's answer, whoever that is by now; raises what it answers, or UnavailableError at the deadline."""
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            self._book.begin_round(resolve_blocking(self._book.names()))
            if self._leader is not None:
                self._book.prefer(self._leader)
            is_election = False  # somebody answered that it does not lead: the next round may find who does
            while not self._book.is_round_over:
                target = self._book.next()
                try:
                    response = self._try(target, method, request, self._share_s(deadline_s))
                except grpc.RpcError as error:
                    is_election |= self._note(target, error, asked=asked)
                else:
                    self._leader = target
                    return response
            self._leader = None
            if not is_election or time.monotonic() + PAUSE_S >= deadline_s:
                raise self._nobody(is_election=is_election)
            time.sleep(PAUSE_S)

    def _try(self, target: Target, method: str, request: Any, timeout_s: float) -> Any:
        number = self._credentials.current().number if self._credentials is not None else 0
        if number != self._number:
            self.close()  # a channel keeps the certificate it was opened with
            self._number = number
        channel = self._channels.get(target.address)
        if channel is None:
            channel = self._channels[target.address] = open_blocking_channel(
                target.address, lease_s=self._timeout_s, credentials=self._credentials
            )
        return getattr(operator_pb2_grpc.OperatorServiceStub(channel), method)(request, timeout=timeout_s)

    def _share_s(self, deadline_s: float) -> float:
        """Of the time that is left each address still untried gets the same, so that a dead machine hides no other."""
        return max(SHORTEST_TRY_S, deadline_s - time.monotonic()) / (self._book.untried_count + 1)

    def _note(self, target: Target, call: grpc.RpcError, *, asked: str) -> bool:
        """Remember why ``target`` was of no use, and whether that is because it does not lead; raises other answers."""
        error = errors.error_of(call, asked=f"cannot {asked} at coordinator {target.address}")
        leader = error.leader if isinstance(error, errors.NotLeaderError) else ""
        is_standby = isinstance(error, errors.NotLeaderError)
        if not is_standby and not errors.is_nobodys_answer(call):
            raise error from call
        found = None if is_standby else probe.diagnose(*split_address(target.address), self._credentials)
        self._refusal = found or self._refusal
        self._book.note(target, str(found or error), leader=leader)
        return is_standby

    def _nobody(self, *, is_election: bool) -> BackstayError:
        if self._refusal is not None:
            return ConfigError(
                f"no coordinator of {self.address} can be spoken with: {self._book.summary()}",
                reason=self._refusal.reason,
            )
        if is_election:
            return UnavailableError(
                f"no coordinator of {self.address} leads (asked for {self._timeout_s:g} s): {self._book.summary()}",
                reason=errors.NOT_LEADER,
            )
        places = "" if self._book.count == 1 else f", {self._book.count} addresses"
        return UnavailableError(
            f"no coordinator answers at {self.address} (a call may take {self._timeout_s:g} s{places}); is `backstayd "
            f"coordinator` running there? ({self._book.summary()})",
            reason="no_coordinator",
        )
