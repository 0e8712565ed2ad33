"""Whether this coordinator leads: alone it always does, with an election it is asked before every answer.

Owns the election and what is shown of it; decides nothing for runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backstay.errors import ConfigError
from backstayd.addresses import is_wildcard, split_address
from backstayd.clock import Clock
from backstayd.config.schema import CoordinatorConfig
from backstayd.election.driver import Election
from backstayd.election.elector import Elector
from backstayd.election.lease import Timing
from backstayd.election.stores import open_store
from backstayd.transport.errors import NotLeaderError


class Leadership:
    """The part of this coordinator in the election.

    Args:
        holder: A name that is new at each start of this process.
        on_lead: Called with the term when this coordinator begins to lead; without an election once, with 0.
        on_step_down: Called with the reason when it ceases to lead; nothing may be sent after that.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        holder: str,
        *,
        clock: Clock,
        on_lead: Callable[[int], None],
        on_step_down: Callable[[str], None],
    ) -> None:
        self._config, self._holder, self._clock = config, holder, clock
        self._on_lead, self._on_step_down = on_lead, on_step_down
        self._election: Election | None = None
        self._is_alone = config.election == ""
        self._term = 0
        self.address = config.advertise

    async def start(self, bound_address: str) -> None:
        """Lead, or compete for it; ConfigError if this cannot be done as configured."""
        self.address = self._config.advertise or bound_address
        if self._is_alone:
            self._on_lead(0)
            return
        host, _ = split_address(self.address)
        if is_wildcard(host):
            raise ConfigError(
                f"an election publishes the address of this coordinator, and {self.address} is not one that others reach; give "
                "--advertise HOST:PORT as nodes and operators reach it",
                reason="no_advertise",
            )
        timing = Timing(lease_s=self._config.election_lease_s)
        store = open_store(self._config.election, call_timeout_s=timing.call_timeout_s)
        elector = Elector(self._holder, self.address, timing)
        self._election = Election(
            store, elector, timing, on_lead=self._lead, on_step_down=self._on_step_down, clock=self._clock.boot_s
        )
        await self._election.start()

    async def close(self) -> None:
        """Step down and hand over."""
        if self._election is not None:
            await self._election.close()

    def may_act(self) -> bool:
        """Whether this coordinator leads at this moment; it steps down if its lease ran out. In the loop only."""
        return self._is_alone or (self._election is not None and self._election.may_act())

    def resign(self, reason: str) -> None:
        """Let another lead, if there is an election."""
        if self._election is not None:
            self._election.resign(reason)

    def failure(self) -> str:
        """What keeps it from ever leading, for people; "" if nothing does. From any thread."""
        return self._election.failure() if self._election is not None else ""

    def is_leading(self) -> bool:
        """The same without stepping down: from any thread, as all that follow."""
        return self._is_alone or (self._election is not None and self._election.is_leading())

    def margin_s(self) -> float:
        """For how long it leads without another renewal; infinite without an election, 0 on a standby."""
        if self._is_alone:
            return float("inf")
        return self._election.margin_s() if self._election is not None else 0.0

    def leader(self) -> str:
        """The leader's address; "" while none is known."""
        if self.is_leading():
            return self.address
        record = self._election.leader() if self._election is not None else None
        return record.address if record is not None and record.holder != self._holder else ""

    def not_leading(self) -> NotLeaderError:
        """The error that answers a call here while another one leads."""
        leader = self.leader()
        where = f"the coordinator at {leader} does" if leader else "no other is known to lead yet; try again"
        return NotLeaderError(f"the coordinator at {self.address} does not lead; {where}", leader=leader)

    def document(self) -> dict[str, Any]:
        """The part of the status document about it."""
        return {
            "address": self.leader(),
            "is_leader": self.is_leading(),
            "election": self._config.election.partition("?")[0],
            "term": self._term,
            "lease_margin_s": None if self._is_alone else self.margin_s(),
        }

    def _lead(self, term: int) -> None:
        self._term = term
        self._on_lead(term)
