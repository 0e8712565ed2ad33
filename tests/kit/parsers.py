"""Everything that reads what a stranger wrote, with valid inputs to make mutants of.

``feed`` gives one mutant to the parser; what it may raise is ``allowed``. Anything else is a fault of the parser.
``python -m tests.kit.parsers --count 50000 [--only NAME] [--seed S]`` feeds so many to each and prints what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from backstay.errors import BackstayError, ConfigError, IntegrityError, UnavailableError
from backstay.format import json_records, shard
from backstay.format.manifest import Manifest
from backstay.ids import Generation, SnapshotKey, snapshot_id
from backstay.protocol import framing, messages
from backstay.protocol.messages import GateEntry
from backstayd.config.load import load_config
from backstayd.config.reference import sample
from backstayd.config.schema import CoordinatorConfig, NodeConfig
from backstayd.core.coordinator import Coordinator
from backstayd.core.inventory.survey import why_no_snapshot
from backstayd.core.messages.decisions import (
    Base,
    Decision,
    Lineage,
    Outcome,
    Placement,
    ShardSource,
    SourceKind,
    Staging,
    StagingState,
)
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.durable import PersistedSnapshot, Survey
from backstayd.core.messages.gate import GateReport
from backstayd.core.messages.plans import FragmentRecord, Member, Plan, Quarantined, ShardRecord, VolumeShard
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.core.policy import CorePolicy
from backstayd.core.status.document import status_document
from backstayd.security import identity
from backstayd.store.record_files import StoredFragment, StoredPlan, parse_manifest
from backstayd.store.slots import check_header
from backstayd.transport import convert, delta
from backstayd.transport.bulk.wire import BulkReply, BulkRequest, Channel, Timeouts
from backstayd.v1 import coordinator_pb2
from tests.kit.mutations import Mutator
from tests.kit.shards import RUN, make_shard

MADE: Final = make_shard(payload_bytes=9000)
DIGEST: Final = MADE.manifest.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """``mutant`` makes one from a mutator; ``feed`` has it read."""

    name: str
    mutant: Callable[[Mutator], Any]
    feed: Callable[[Any], object]
    allowed: tuple[type[BaseException], ...] = (BackstayError,)


def feed_all(parser: Parser, *, count: int, seed: int) -> list[str]:
    """What went wrong, a line each, with what makes it happen again."""
    found = []
    for number in range(count):
        mutant = parser.mutant(Mutator((parser.name, seed, number)))
        try:
            parser.feed(mutant)
        except parser.allowed:
            pass
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            found.append(f"{parser.name} --seed {seed}, mutant {number}: {error!r:.200} from {mutant!r:.300}")
    return found


# -- valid inputs --------------------------------------------------------------------------------------------------------


def a_plan() -> Plan:
    rows = tuple(VolumeShard(rank=0, size_bytes=len(MADE.data), digest=DIGEST) for _ in range(1))
    members = tuple(
        Member(node=f"n{index}", incarnation="i", bulk_address="h:1", shards=rows if index == 0 else ())
        for index in range(3)
    )
    return Plan(
        run=RUN, snapshot_id=an_id(), attempt=1, step=1, world_size=1, m=1, chunk_bytes=MADE.manifest.chunk_bytes,
        members=members,
    ).sealed()  # fmt: skip


def an_id() -> str:
    return snapshot_id(key=SnapshotKey(1, 1), world_size=1, shard_digests=[DIGEST])


def a_decision() -> Decision:
    return Decision(
        decision_id="d" * 32, generation=Generation(3, "c"), run=RUN, world_id="w", world_size=1, attempt=2,
        outcome=Outcome.EXACT, base=Base(attempt=1, step=1, snapshot_id=an_id(), world_size=1),
        lineage=(Lineage(attempt=2, base_attempt=1, base_step=1), Lineage(attempt=1, base_attempt=0, base_step=0)),
        placements=(Placement(rank=0, node="n0"),),
        sources=(ShardSource(rank=0, size_bytes=len(MADE.data), digest=DIGEST, kind=SourceKind.LOCAL, holders=("n0",)),),
    )  # fmt: skip


def a_persisted() -> PersistedSnapshot:
    return PersistedSnapshot(
        run=RUN, attempt=1, step=1, world_size=1, snapshot_id=an_id(), owner="1000", generation=3, serial=1,
        shards=(VolumeShard(rank=0, size_bytes=len(MADE.data), digest=DIGEST),),
        lineage=(Lineage(attempt=1, base_attempt=0, base_step=0),),
    )  # fmt: skip


def a_report() -> NodeReport:
    gate = GateReport(decision_id="d" * 32, entries=(GateEntry(name="layout: all", ranks=(), digest="x"),))
    session = SessionRecord(
        world_id="w", rank=0, world_size=1, phase=SessionPhase.RESTORING, last_step=1, needs=(0,), gate=gate
    )
    held = ShardRecord(attempt=1, step=1, rank=0, world_size=1, size_bytes=len(MADE.data), digest=DIGEST, world_id="w0")
    run = RunReport(
        run=RUN, sessions=(session,), shards=(held,), plans=(a_plan(),), decision=a_decision(), owner="1000",
        fragments=(FragmentRecord(plan_id=a_plan().plan_id, stripe=1, index=0),),
        staging=Staging(decision_id="d" * 32, state=StagingState.READY),
        quarantined=(Quarantined(what="shard", attempt=1, step=1, reason="bad", node="n1", rank=0),),
        survey=Survey(url="file:///s/job/run", is_done=True, is_known=True, snapshots=(a_persisted(),), survey_id="s"),
    )  # fmt: skip
    identity_ = NodeIdentity(name="n0", incarnation="i0", bulk_address="h:1")
    return NodeReport(node=identity_, sequence=3, generation=Generation(3, "c"), runs=(run,), capacity_bytes=1 << 30)


def frames() -> list[dict[str, Any]]:
    frames = [
        messages.Attach(run=RUN, world_id="w", rank=0, world_size=2, needs=(0, 1)),
        messages.Restore(deadline_s=1.0, world_size=2),
        messages.Reserve(step=3, size_bytes=4096, known_slots=("a",)),
        messages.Commit(step=3, slot_id="a", manifest=MADE.json, cost=messages.TrainerCost(snapshot_s=0.1)),
        messages.Gate(decision_id="d", entries=(messages.GateEntry(name="n", ranks=(0,), digest="x"),)),
        messages.Fetch(decision_id="d", shards=(messages.ChunkRanges(rank=0, firsts=(0,), counts=(2,)),)),
        messages.Abandon(step=3, slot_id="a", reason="r"),
        messages.Open(run=RUN, step=3),
        messages.Distrust(step=3, reason="r"),
        messages.AwaitSeal(after_step=3),
        messages.Finish(),
    ]
    return [{"type": type(m).__name__, "id": 1, "body": json_records.to_json(m)} for m in frames]


# -- how each is fed -----------------------------------------------------------------------------------------------------


def json_or_bytes(mutator: Mutator, value: Any) -> bytes:
    """A mutant of a JSON value: of its tree mostly, of its bytes now and then."""
    if mutator.random.random() < 0.25:
        return mutator.bytes(json.dumps(value).encode())
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(mutator.tree(value)).encode()
    return mutator.bytes(json.dumps(value).encode())


def shard_mutant(mutator: Mutator) -> bytes:
    """A shard file with another header; its length is right or nearly so."""
    specs = [shard.TensorSpec.whole("w", "torch.float32", (3, 5)), shard.TensorSpec.whole("b", "torch.complex64", ())]
    layout = shard.plan_layout(specs, metadata={"note": "x"}, aliases={"tied": "w"})
    body = bytes(layout.size_bytes - layout.header_bytes)
    if mutator.random.random() < 0.2:
        return mutator.bytes(layout.header + body)
    document = json.loads(layout.header[8:])
    inner = mutator.random.random() < 0.5  # JSON within JSON
    if inner:
        key = mutator.random.choice([k for k, v in document["__metadata__"].items() if v[:1] in "{["])
        changed = json_or_bytes(mutator, json.loads(document["__metadata__"][key])).decode(errors="replace")
        text = json.dumps(document | {"__metadata__": document["__metadata__"] | {key: changed}}).encode()
    else:
        text = json_or_bytes(mutator, document)
    padded = text.ljust(-(-(len(text) + 8) // shard.PAGE_BYTES) * shard.PAGE_BYTES - 8)
    length = max(0, len(padded) + mutator.random.choice((0, 0, 0, 0, 4096, -4096)))
    return struct.pack("<Q", length) + padded + body


def commit_mutant(mutator: Mutator) -> tuple[bytes, Any]:
    """A slot and its manifest, with digests that fit, or a manifest that does not."""
    (length,) = struct.unpack("<Q", MADE.data[:8])
    header = json.loads(MADE.data[8 : 8 + length])
    text = json_or_bytes(mutator, header)[: 4096 - 8].ljust(4096 - 8)
    data = struct.pack("<Q", len(text)) + text + MADE.data[4096:]
    if mutator.random.random() < 0.3:
        return data, mutator.tree(MADE.json)
    from crc32c import crc32c

    size = MADE.manifest.chunk_bytes
    crcs = "".join(f"{crc32c(data[i : i + size]):08x}" for i in range(0, len(data), size))
    return data, json_records.to_json(replace(MADE.manifest, chunk_crcs=crcs))


def feed_commit(mutant: tuple[bytes, Any]) -> None:
    data, manifest_json = mutant
    manifest = json_records.from_json(Manifest, manifest_json)
    manifest.check()
    fd = os.memfd_create("slot")
    try:
        os.write(fd, data)
        check_header(fd, manifest)
        shard.check_file(fd, manifest)
    finally:
        os.close(fd)


def feed_manifest(mutant: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        parse_manifest(mutant, digest=DIGEST)
    manifest = json_records.loads(Manifest, mutant)
    manifest.check()
    assert len(json_records.dumps(manifest)) < 10 * len(mutant) + 1000


def feed_plan(mutant: bytes) -> None:
    stored = json_records.loads(StoredPlan, mutant)
    stored.chunks_by_digest()
    StoredFragment(
        run=RUN, attempt=1, step=1, plan_id=stored.plan.plan_id, stripe=0, index=0, size_bytes=0
    ).check(stored.plan, 0, 0)  # fmt: skip


def feed_report(mutant: bytes) -> None:
    """All that a coordinator does with a report, beside an honest run; what is evaluated must be served."""
    message = coordinator_pb2.NodeReport()
    try:
        message.ParseFromString(mutant)
    except Exception:  # noqa: BLE001 - gRPC refuses it before we see it
        return
    core = Coordinator(CorePolicy(lease_s=1.0), "c1", now_s=0.0)
    honest = SessionRecord(world_id="w", rank=0, world_size=1, phase=SessionPhase.RESTORING)
    node = NodeIdentity(name="honest", incarnation="i", bulk_address="h:1")
    core.observe(NodeReport(node=node, sequence=1, runs=(RunReport(run="job/honest", sessions=(honest,)),)), 0.5)
    refused: BackstayError | None = None
    try:
        core.observe(convert.from_message(NodeReport, message), 0.5)
    except BackstayError as error:
        refused = error
    core.tick(1.0)
    core.evaluate()
    core.evaluate()
    core.check_invariants()  # no run was set apart: nothing raised within an evaluation
    assert core.runs["job/honest"].recovery.world_id == "w", "the honest run is not served"
    for name in core.nodes.nodes:
        convert.to_message(core.desired(name), coordinator_pb2.NodeDesired)
    assert len(json.dumps(status_document(core, 1.0))) < 4 << 20
    if refused is not None:
        raise refused


def feed_delta(mutant: bytes) -> None:
    request = coordinator_pb2.SyncRequest()
    try:
        request.ParseFromString(mutant)
    except Exception:  # noqa: BLE001 - as above
        return
    delta.read(request.report, request.delta, a_report())


def delta_mutant(mutator: Mutator) -> bytes:
    request = coordinator_pb2.SyncRequest(takes_deltas=True)
    changed = replace(
        a_report(), used_bytes=7, runs=(replace(a_report().runs[0], rebuilt_bytes=5), RunReport(run="job/b"))
    )
    request.delta.CopyFrom(delta.write(changed, a_report(), request.report))
    return message_mutant(mutator, request)


def message_mutant(mutator: Mutator, message: Any) -> bytes:
    if mutator.random.random() < 0.2:
        return mutator.bytes(message.SerializeToString())
    return bytes(mutator.message(message).SerializeToString())


def feed_desired(mutant: bytes) -> None:
    message = coordinator_pb2.NodeDesired()
    try:
        message.ParseFromString(mutant)
    except Exception:  # noqa: BLE001 - as above
        return
    convert.from_message(NodeDesired, message)


def a_desired() -> Any:
    run = RunDesired(run=RUN, world_id="w", decision=a_decision(), plans=(a_plan(),), release=(SnapshotKey(1, 1),))
    return convert.to_message(NodeDesired(generation=Generation(3, "c"), runs=(run,)), coordinator_pb2.NodeDesired)


def bulk_mutant(mutator: Mutator) -> tuple[type[Any], bytes]:
    kind, value = mutator.random.choice(
        [
            (BulkRequest, BulkRequest(op="read_shard", run=RUN, digest=DIGEST, kept=((0, 2), (5, 1)))),
            (BulkReply, BulkReply(payload_bytes=100, total_bytes=100, chunk_crcs="00" * 8)),
        ]
    )
    body = json_or_bytes(mutator, json_records.to_json(value))
    length = len(body) + mutator.random.choice((0, 0, 0, 0, 1, -1, 1 << 20, 0x16 << 24))
    return kind, struct.pack(">I", max(0, length)) + body


def feed_bulk(mutant: tuple[type[Any], bytes]) -> None:
    kind, data = mutant
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[:100_000])
        theirs.shutdown(socket.SHUT_WR)
        channel = _PairChannel(ours)
        channel.receive_record(kind)


class _PairChannel(Channel):
    """A channel on a socket pair, which has none of TCP's options."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket, self.name, self._timeouts = sock, "peer", Timeouts()


def config_mutant(mutator: Mutator) -> bytes:
    text = sample(NodeConfig, CoordinatorConfig).replace("insecure = false", "insecure = true")
    lines = text.splitlines()
    for _ in range(mutator.changes()):
        at = mutator.random.choice([i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")])
        name, _, value = lines[at].partition("=")
        new = mutator.replacement(mutator.random.choice((value.strip().strip('"'), 5, True, [value])))
        try:
            lines[at] = f"{name}= {json.dumps(new)}"
        except (ValueError, RecursionError):
            lines[at] = name
    raw = "\n".join(lines).encode()
    return mutator.bytes(raw) if mutator.random.random() < 0.2 else raw


def feed_config(mutant: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(mutant)
        file.flush()
        for cls in (NodeConfig, CoordinatorConfig):
            load_config(cls, file=Path(file.name), environ={}, flags={})


def identity_mutant(mutator: Mutator) -> list[str]:
    uris = [identity.Identity(trust_domain="t", role=role, name="n1" if role is identity.Role.NODE else "").uri
            for role in identity.Role]  # fmt: skip
    chosen = mutator.random.choice(uris)
    text = mutator.bytes(chosen.encode()).decode(errors="surrogateescape")
    return [text] if mutator.random.random() < 0.9 else [text, *uris]


def feed_identity(mutant: list[str]) -> None:
    found = identity.identify(mutant, trust_domain="t")
    assert [found.uri] == mutant, "an identity is taken whole and as it stands"


def survey_problem(mutant: bytes) -> str:
    return why_no_snapshot(json_records.loads(PersistedSnapshot, mutant), run=RUN, key=SnapshotKey(1, 1))


# -- checkpoints of others (torch) ---------------------------------------------------------------------------------------


def dcp_metadata() -> Any:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    tensor = TensorStorageMetadata(properties=TensorProperties(), size=torch.Size([4]), chunks=[chunk])
    stored = _StorageInfo(relative_path="__0_0.distcp", offset=0, length=100)
    return Metadata({"model.w": tensor}, storage_data={MetadataIndex("model.w", torch.Size([0]), 0): stored})


def dcp_mutant(mutator: Mutator) -> bytes:
    metadata = dcp_metadata()
    if mutator.random.random() < 0.4:
        return mutator.bytes(pickle.dumps(metadata))
    (tensor,), (stored,) = metadata.state_dict_metadata.values(), metadata.storage_data.values()
    target, name = mutator.random.choice(
        [(stored, "relative_path"), (stored, "offset"), (stored, "length"), (tensor, "size"), (tensor, "chunks"),
         (tensor, "properties"), (tensor.chunks[0], "sizes"), (tensor.chunks[0], "offsets"), (metadata, "storage_data"),
         (metadata, "state_dict_metadata"), (metadata, "planner_data"), (metadata, "storage_meta")]
    )  # fmt: skip
    value = getattr(target, name)
    object.__setattr__(target, name, mutator.replacement(list(value) if isinstance(value, tuple) else value))
    try:
        return pickle.dumps(metadata)
    except RecursionError:
        return mutator.bytes(pickle.dumps(dcp_metadata()))


def feed_dcp(mutant: bytes) -> None:
    from backstay.convert import foreign_checkpoints

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / ".metadata").write_bytes(mutant)
        found = foreign_checkpoints.read_checkpoint(Path(directory), "dcp")
        for source in found.sources if zlib.crc32(mutant) % 16 == 0 else ():  # DCP's own reader is slow
            if source.size_bytes < 1 << 20:
                source.read()


def huggingface_mutant(mutator: Mutator) -> tuple[bytes, bytes]:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    text = json_or_bytes(mutator, header) if mutator.random.random() < 0.6 else json.dumps(header).encode()
    index = json_or_bytes(mutator, {"weight_map": {"w": "m.safetensors"}})
    return struct.pack("<Q", len(text)) + text + bytes(8), index


def feed_huggingface(mutant: tuple[bytes, bytes]) -> None:
    from backstay.convert import foreign_checkpoints, huggingface

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "m.safetensors").write_bytes(mutant[0])
        with contextlib.suppress(BackstayError):
            foreign_checkpoints.read_checkpoint(Path(directory), "huggingface")
        (Path(directory) / huggingface.INDEX).write_bytes(mutant[1])
        foreign_checkpoints.read_checkpoint(Path(directory), "huggingface")


PARSERS: Final = (
    Parser(
        name="local frames",
        mutant=lambda m: json_or_bytes(m, m.random.choice(frames())),
        feed=framing.decode_payload,
        allowed=(IntegrityError,),
    ),
    Parser(name="shard header", mutant=shard_mutant, feed=shard.parse_header, allowed=(IntegrityError,)),
    Parser(name="commit", mutant=commit_mutant, feed=feed_commit, allowed=(IntegrityError,)),
    Parser(
        name="manifest", mutant=lambda m: json_or_bytes(m, MADE.json), feed=feed_manifest, allowed=(IntegrityError,)
    ),
    Parser(
        name="plan",
        mutant=lambda m: json_or_bytes(m, json_records.to_json(StoredPlan(plan=a_plan(), manifests=(MADE.json,)))),
        feed=feed_plan,
        allowed=(IntegrityError,),
    ),
    Parser(
        name="decision",
        mutant=lambda m: json_or_bytes(m, json_records.to_json(a_decision())),
        feed=lambda mutant: json_records.loads(Decision, mutant),
        allowed=(IntegrityError,),
    ),
    Parser(
        name="completion record",
        mutant=lambda m: json_or_bytes(m, json_records.to_json(a_persisted())),
        feed=survey_problem,
        allowed=(IntegrityError,),
    ),
    Parser(
        name="report",
        mutant=lambda m: message_mutant(m, convert.to_message(a_report(), coordinator_pb2.NodeReport)),
        feed=feed_report,
    ),
    Parser(name="changed report", mutant=delta_mutant, feed=feed_delta),
    Parser(name="desired state", mutant=lambda m: message_mutant(m, a_desired()), feed=feed_desired),
    Parser(name="bulk wire", mutant=bulk_mutant, feed=feed_bulk, allowed=(IntegrityError, UnavailableError)),
    Parser(name="configuration", mutant=config_mutant, feed=feed_config, allowed=(ConfigError,)),
    Parser(name="certificate names", mutant=identity_mutant, feed=feed_identity, allowed=(ConfigError,)),
    Parser(name="DCP metadata", mutant=dcp_mutant, feed=feed_dcp),
    Parser(name="Hugging Face files", mutant=huggingface_mutant, feed=feed_huggingface),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what parsers of others print."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    bad = 0
    for one in PARSERS:
        if given.only not in one.name:
            continue
        begun_s = time.monotonic()
        found = feed_all(one, count=given.count, seed=given.seed)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{one.name}: {given.count} mutants, {len(found)} faults, {time.monotonic() - begun_s:.0f} s, "
              f"peak {peak_mib} MiB", flush=True)  # fmt: skip
        for line in found[:10]:
            print(f"  {line}", flush=True)
        bad += len(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
