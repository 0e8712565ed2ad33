"""What must hold after every event, computed from the true contents of all tmpfs and independent of the core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backstay.ids import SnapshotKey
from backstayd.core.inventory import geometry
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.durable import PersistedSnapshot
from backstayd.core.messages.plans import Plan, ShardRecord

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.node import Node, Trainer


class BrokenPromiseError(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class WorldTruth:
    """What one world restored and wrote. ``ranks_of_step``: who committed each step."""

    decision: Decision
    ranks_of_step: dict[int, set[int]] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)


@dataclass(slots=True)
class RunTruth:
    worlds: dict[str, WorldTruth] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # worlds in the order of their first release
    decided: dict[str, Decision] = field(default_factory=dict)  # world to the decision that took effect
    was_complete: bool = False
    floor: tuple[int, int, str] | None = None  # newest snapshot that was truly protected: order of world, step, world
    losses: set[int] = field(default_factory=set)  # nodes destroyed since then
    bearable: int = 0  # losses that it survived when it was last seen whole: nodes that joined since bear none of it
    floors: list[tuple[float, tuple[int, int, str]]] = field(default_factory=list)  # when it was raised to what
    forgiven_s: float = -1.0  # an operator trusted everything again
    bad: dict[tuple[str, int], tuple[str, float]] = field(default_factory=dict)  # writer, step: snapshot id, since when


class Checker:
    """Keeps the history of every run and compares it with what nodes do and hold."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.runs: dict[str, RunTruth] = {}
        self.is_tolerant_of_corruption = False
        self.recorded_at: dict[str, set[str]] = {}
        self._shapes: dict[str, dict[int, list[tuple[set[int], list[str]]]]] = {}

    # -- events -------------------------------------------------------------------------------------------------------

    def recorded(self, node: Node, decision: Decision) -> None:
        self.recorded_at.setdefault(decision.decision_id, set()).add(node.name)

    def released(self, node: Node, trainer: Trainer, decision: Decision) -> None:
        truth = self.runs.setdefault(trainer.run, RunTruth())
        before = truth.decided.setdefault(trainer.world_id, decision)
        self._require(
            before.decision_id == decision.decision_id, f"two decisions took effect in world {trainer.world_id}"
        )
        self._require(decision.outcome is not Outcome.REFUSED, "a refusal released a trainer")
        hosts = {place.node for place in decision.placements}
        self._require(
            hosts <= self.recorded_at.get(decision.decision_id, set()), "released before every host had recorded"
        )
        if decision.outcome is Outcome.NONE:
            is_stored = bool(self.cluster.storage.runs.get(trainer.run))
            self._require(not is_stored or trainer.allow_fresh, "NONE for a run that storage knows")
            is_forgotten = self.cluster.policy.persist_url != "" and not is_stored  # and so is what lay nowhere else
            self._require(
                not truth.was_complete or trainer.allow_fresh or is_forgotten,
                "NONE for a run that had a whole snapshot",
            )
        else:
            self._check_base(node, trainer, decision, truth)
        if trainer.world_id not in truth.worlds:
            truth.worlds[trainer.world_id] = WorldTruth(decision)
            truth.order.append(trainer.world_id)
            truth.floor = self._floor_of(truth, decision)
        truth.worlds[trainer.world_id].released.add(trainer.rank)

    def _check_base(self, node: Node, trainer: Trainer, decision: Decision, truth: RunTruth) -> None:
        assert decision.base is not None
        chain = self._live_chain(truth, exclude=trainer.world_id)
        writers = {source.digest.split("/")[1] for source in decision.sources}
        steps = {int(source.digest.split("/")[0]) for source in decision.sources}
        ranks = [int(source.digest.split("/")[2]) for source in decision.sources]
        self._require(len(writers) == 1 and len(steps) == 1, f"a mix of histories was restored: {writers}, {steps}")
        self._require(ranks == list(range(decision.base.world_size)), "not every shard is restored, or one twice")
        writer, step = next(iter(writers)), next(iter(steps))
        self._require(step == decision.base.step, "the restored bytes are of another step than the decision says")
        self._require(
            any(world == writer and (limit is None or step <= limit) for world, limit in chain),
            f"restored step {step} of dead history {writer}",
        )
        known = [
            spot for spot in self._spoilers(truth, writer, step) if self._is_widely_known(trainer.run, *truth.bad[spot])
        ]
        self._require(not known, f"restored step {step} of {writer}, spoilt by {known}")
        if decision.base.world_size != decision.world_size:
            return  # its chunks lie in no shard of this node
        shard = node.memory[trainer.run].shards.get((decision.base.attempt, step, trainer.rank))
        self._require(
            shard is not None and shard.digest == decision.sources[trainer.rank].digest,
            f"rank {trainer.rank} was released without its shard of step {step}",
        )

    def distrusted(self, run: str, world_id: str) -> None:
        truth = self.runs[run]
        decision = truth.worlds[world_id].decision
        assert decision.base is not None
        spot = (decision.sources[0].digest.split("/")[1], decision.base.step)
        truth.bad[spot] = (decision.base.snapshot_id, self.cluster.engine.now_s)

    def trusted(self, run: str) -> None:
        if run in self.runs:
            self.runs[run].forgiven_s = self.cluster.engine.now_s
            self.runs[run].bad.clear()

    def _spoilers(self, truth: RunTruth, writer: str, step: int) -> list[tuple[str, int]]:
        """Distrusted snapshots that (writer, step) is, or was trained from."""
        found = []
        while True:
            found += [spot for spot in truth.bad if spot[0] == writer and spot[1] <= step]
            decision = truth.worlds[writer].decision
            if decision.base is None:
                return found
            writer, step = decision.sources[0].digest.split("/")[1], decision.base.step

    def _is_widely_known(self, run: str, snapshot_id: str, since_s: float) -> bool:
        """Whether a node that nothing happened to for a while remembers it, and has for a while."""
        limit_s = self.cluster.engine.now_s - 3 * self.cluster.lease_s
        return since_s < limit_s and any(
            run in node.memory and snapshot_id in node.memory[run].distrusted and node.steady_since_s < limit_s
            for node in self.cluster.nodes.values()
        )

    def refused(self, decision: Decision) -> None:
        """A refusal is wrong if nodes that nothing has happened to for a while hold enough."""
        engine, lease_s = self.cluster.engine, self.cluster.lease_s
        truth = self.runs.get(decision.run)
        if truth is not None and truth.forgiven_s > engine.now_s - lease_s:
            return  # decided before an operator trusted everything again
        if truth is None or not truth.worlds or self.cluster.quiet_since_s > engine.now_s - 3 * lease_s:
            return
        self._check_stored(decision, truth)
        if any(node.staging_trouble or node.recording_trouble for node in self.cluster.nodes.values()):
            return  # what is held cannot be restored there
        steady = {name for name, node in self.cluster.nodes.items() if node.steady_since_s < engine.now_s - 3 * lease_s}
        chain = self._live_chain(truth)
        for place in self._candidates(decision.run, truth, chain, steady):
            if self._spoilers(truth, place[2], place[1]):
                continue
            spares = self._true_spares(decision.run, place, steady)
            self._require(spares < 0, f"refused although step {place[1]} is restorable: {decision.message}")

    def pruned(self, run: str, key: SnapshotKey) -> None:
        """A copy is given up only if a newer one of the live history, that may be restored, lies there."""
        truth = self.runs[run]
        limits = dict(self._live_chain(truth))
        newer = [
            record
            for record in self.cluster.storage.records(run)
            if record.key > key and self._is_alive(limits, record) and not self._known_spoilers(run, truth, record)
        ]
        self._require(bool(newer), f"{key} was pruned, and nothing newer of the live history is left")

    def _known_spoilers(self, run: str, truth: RunTruth, record: PersistedSnapshot) -> list[tuple[str, int]]:
        """Those that a node still remembers: distrust does not outlive the loss of the whole cluster."""
        spots = self._spoilers(truth, *self._spot(record))
        return [spot for spot in spots if self._is_widely_known(run, *truth.bad[spot])]

    def _spot(self, record: PersistedSnapshot) -> tuple[str, int]:
        return record.shards[0].digest.split("/")[1], record.step

    def _stored_places(
        self, run: str, truth: RunTruth, chain: list[tuple[str, int | None]]
    ) -> list[tuple[int, int, str]]:
        spots = [self._spot(r) for r in self.cluster.storage.records(run) if self._is_alive(dict(chain), r)]
        return [(truth.order.index(writer), step, writer) for writer, step in spots]

    def _is_alive(self, limits: dict[str, int | None], record: PersistedSnapshot) -> bool:
        limit = limits.get(self._spot(record)[0], -1)
        return limit is None or record.step <= limit

    def _check_stored(self, decision: Decision, truth: RunTruth) -> None:
        """What lies on storage, sound, of the live history and for long, is reason enough not to refuse."""
        limits = dict(self._live_chain(truth))
        for record in self.cluster.storage.records(decision.run) if self.cluster.storage.is_up else ():
            is_sound = self._is_alive(limits, record) and not self._spoilers(truth, *self._spot(record))
            is_steady = self.cluster.storage.down_until_s < self.cluster.engine.now_s - 15 * self.cluster.lease_s
            self._require(not (is_sound and is_steady), f"refused with {record.key} on storage: {decision.message}")

    def committed(self, run: str, shard: ShardRecord) -> None:
        truth = self.runs[run]
        world = truth.worlds[shard.world_id]
        ranks = world.ranks_of_step.setdefault(shard.step, set())
        ranks.add(shard.rank)
        if len(ranks) == shard.world_size:
            truth.was_complete = True

    def destroyed(self, node: Node) -> None:
        for run, truth in self.runs.items():
            if run in node.memory:
                truth.losses.add(id(node))

    def stopped_drained(self, leaving: set[str], told_s: float) -> None:
        """What was protected before they were called safe has outlived the stop of nodes that drained, with all its spares.

        Their stop is no loss: as many others may be lost as before.
        """
        self.check()
        names = set(self.cluster.nodes) - leaving
        for run, truth in self.runs.items():
            known = [f for at_s, f in truth.floors if at_s < told_s - self.cluster.lease_s]
            if truth.floor is None or not known or not names or len(truth.losses) > 0:
                continue
            owed = min(known[-1], truth.floor)
            hosts = {place.node for place in truth.worlds[truth.order[-1]].decision.placements}
            goal = min(self.cluster.policy.wanted_parity(len(hosts)), len(names) - 1)
            chain = self._live_chain(truth)
            kept = [p for p in self._candidates(run, truth, chain) if p >= owed]
            kept = [p for p in kept if self._true_spares(run, p, names) >= goal]
            self._require(
                bool(kept) or self.is_tolerant_of_corruption,
                f"{leaving} were called safe to stop, step {owed[1]} of {run} is not",
            )
            if kept:
                truth.floor = kept[0]

    # -- after every event --------------------------------------------------------------------------------------------

    def after_event(self) -> None:
        if self.cluster.engine.event_count % 12 == 0:
            self.check()

    def check(self) -> None:
        """I3: once protected, still restorable after no more losses than parity covers."""
        for run, truth in self.runs.items():
            chain = self._live_chain(truth)
            candidates = self._candidates(run, truth, chain)
            for place in candidates:
                if truth.floor is not None and place < truth.floor:
                    break
                if self._true_spares(run, place) >= self._parity(truth):
                    if truth.floor != place:
                        truth.floors = [*truth.floors[-50:], (self.cluster.engine.now_s, place)]
                    truth.floor = place
                    truth.bearable = self._parity(truth)
                    truth.losses.clear()
                    break
            is_owed = truth.floor is not None and len(truth.losses) <= min(truth.bearable, self._parity(truth))
            if is_owed and not self.is_tolerant_of_corruption:
                assert truth.floor is not None
                alive = any(place >= truth.floor and self._true_spares(run, place) >= 0 for place in candidates)
                alive = alive or any(place >= truth.floor for place in self._stored_places(run, truth, chain))
                self._require(
                    alive,
                    f"step {truth.floor[1]} of {run} was protected, {len(truth.losses)} nodes were lost: all gone",
                )

    def _parity(self, truth: RunTruth) -> int:
        last = truth.worlds[truth.order[-1]].decision
        hosts = len({place.node for place in last.placements})
        return max(0, min(self.cluster.policy.wanted_parity(hosts), len(self.cluster.nodes) - 1))

    def _live_chain(self, truth: RunTruth, exclude: str = "") -> list[tuple[str, int | None]]:
        """Worlds of the live history with the last step that counts of each, newest first."""
        worlds = [world for world in truth.order if world != exclude]
        if not worlds:
            return []
        chain: list[tuple[str, int | None]] = []
        world, limit = worlds[-1], None
        while True:
            chain.append((world, limit))
            decision = truth.worlds[world].decision
            if decision.base is None:
                return chain
            world = decision.sources[0].digest.split("/")[1]
            limit = decision.base.step

    def _floor_of(self, truth: RunTruth, decision: Decision) -> tuple[int, int, str] | None:
        """A decision for an older snapshot gives up what lies above it."""
        if decision.base is None:
            return None
        writer = decision.sources[0].digest.split("/")[1]
        place = (truth.order.index(writer), decision.base.step, writer)
        return min(place, truth.floor) if truth.floor is not None else None

    def _candidates(
        self, run: str, truth: RunTruth, chain: list[tuple[str, int | None]], names: set[str] | None = None
    ) -> list[tuple[int, int, str]]:
        limits = dict(chain)
        steps = {
            (writer, int(step))
            for node in self.cluster.nodes.values()
            if run in node.memory and (names is None or node.name in names)
            for step, writer in (
                [s.digest.split("/")[:2] for s in node.memory[run].shards.values()]
                + [self._first_digest(p).split("/")[:2] for p in node.memory[run].plans.values()]
            )
        }
        found = []
        for writer, step in steps:
            limit = limits.get(writer, -1)
            if limit is None or step <= limit:
                found.append((truth.order.index(writer), step, writer))
        return sorted(found, reverse=True)

    def _first_digest(self, plan: Plan) -> str:
        return next(shard.digest for member in plan.members for shard in member.shards)

    def _true_spares(self, run: str, place: tuple[int, int, str], names: set[str] | None = None) -> int:
        """Any so many nodes may be destroyed now and every shard is still there or decodes; -1 if some is gone."""
        _, step, writer = place
        holders: dict[str, set[str]] = {}
        plans: dict[str, Plan] = {}
        parity: dict[tuple[str, int, int], set[str]] = {}
        size = 0
        for name, node in self.cluster.nodes.items():
            memory = node.memory.get(run)
            if memory is None or (names is not None and name not in names):
                continue
            for shard in memory.shards.values():
                if shard.step == step and shard.world_id == writer and shard.digest not in memory.corrupt:
                    holders.setdefault(shard.digest, set()).add(name)
                    size = shard.world_size
            for plan in memory.plans.values():
                if plan.step == step and self._first_digest(plan).split("/")[1] == writer:
                    plans[plan.plan_id] = plan
                    size = plan.world_size
            for fragment in memory.fragments:
                if fragment not in memory.corrupt:
                    parity.setdefault(fragment, set()).add(name)
        spares = 99
        for rank in range(size):
            digest = f"{step}/{writer}/{rank}"
            by_copies = len(holders.get(digest, ())) - 1
            by_plans = [self._plan_spares(plan, rank, holders, parity) for plan in plans.values()]
            spares = min(spares, max([by_copies, *by_plans]))
        return spares if size else -1

    def _plan_spares(
        self, plan: Plan, rank: int, holders: dict[str, set[str]], parity: dict[tuple[str, int, int], set[str]]
    ) -> int:
        stripes = self._stripes_of(plan)
        mine = [stripe for stripe, fragments in stripes.items() if any(rank in ranks for ranks, _ in fragments)]
        if not mine:
            return -1
        return min(self._stripe_spares(plan, stripe, stripes[stripe], holders, parity) for stripe in mine)

    def _stripes_of(self, plan: Plan) -> dict[int, list[tuple[set[int], list[str]]]]:
        """Per stripe its data fragments, each as the ranks and digests of the shards that its bytes are of."""
        found = self._shapes.get(plan.plan_id)
        if found is None:
            found = self._shapes[plan.plan_id] = {}
            count = len(plan.members)
            for stripe in range(count):
                for member in geometry.data_members(stripe, n=count, m=plan.m):
                    digests = {s.rank: s.digest for s in plan.members[member].shards}
                    chunks = geometry.block_range(plan, stripe, member)
                    ranks = {segment.rank for segment in geometry.segments(plan, member, chunks)}
                    found.setdefault(stripe, []).append((ranks, [digests[rank] for rank in ranks]))
        return found

    def _stripe_spares(
        self,
        plan: Plan,
        stripe: int,
        fragments: list[tuple[set[int], list[str]]],
        holders: dict[str, set[str]],
        parity: dict[tuple[str, int, int], set[str]],
    ) -> int:
        places: list[set[str] | None] = [
            set.intersection(*(holders.get(digest, set()) for digest in digests)) if digests else None
            for _, digests in fragments
        ]
        places.extend(parity.get((plan.plan_id, stripe, index), set()) for index in range(plan.m))
        available = sum(1 for place in places if place is None or place)
        if available < plan.k:
            return -1
        counts: dict[str, int] = {}
        for place in places:
            if place:
                chosen = min(place, key=lambda name: (counts.get(name, 0), name))
                counts[chosen] = counts.get(chosen, 0) + 1
        spares = 0
        for worst in sorted(counts.values(), reverse=True):
            available -= worst
            if available < plan.k:
                break
            spares += 1
        return spares

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise BrokenPromiseError(
                f"seed {self.cluster.engine.seed}, t={self.cluster.engine.now_s - 1000:.3f} s: {promise}"
            )

    # -- questions of scenarios ---------------------------------------------------------------------------------------

    def can_lose(self, count: int) -> bool:
        """Whether every run survives ``count`` more losses, by what was truly protected last.

        A node that is silent for a lease is taken for lost by everybody, whatever it still holds.
        """
        self.check()
        silent = sum(
            1
            for node in self.cluster.nodes.values()
            if self.cluster.engine.now_s - node.heard_s >= self.cluster.lease_s
        )
        return all(
            truth.floor is not None and len(truth.losses) + silent + count <= min(truth.bearable, self._parity(truth))
            for truth in self.runs.values()
        ) and len(self.runs) == len(self.cluster.jobs)

    def forget(self, run: str) -> None:
        """The run ended: nothing is promised any more."""
        self.runs.pop(run, None)

    def protected_step(self, run: str) -> int:
        truth = self.runs.get(run)
        return truth.floor[1] if truth is not None and truth.floor is not None else 0
