"""Gathering the manifests of a whole snapshot on this node, so that ranks of another layout can choose what they need.

Each is checked against its digest before it is kept. Moves no bytes of shards.
"""

from __future__ import annotations

from backstay.errors import BackstayError, UnavailableError
from backstay.ids import SnapshotKey
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import FetchManifests
from backstayd.store.record_files import make_directory, parse_manifest, write_atomically
from backstayd.transport.bulk.client import ShardRef


def run_fetch_manifests(context: JobContext, job: FetchManifests) -> None:
    """Do ``job``. Raises UnavailableError, naming ranks, when no address has the manifests of some."""
    if job.url:
        from backstayd.coder.durable.fetch_chunks import fetch_stored_manifests  # only where stores are read

        fetch_stored_manifests(context, job)
        return
    paths, key = context.paths(job.run), SnapshotKey(job.attempt, job.step)
    make_directory(paths.staging)
    left = dict(zip(job.ranks, job.digests, strict=True))
    failures: list[str] = []
    for address in dict.fromkeys(job.addresses):
        if not left:
            break
        client = context.client(address)
        try:
            for rank, digest in list(left.items()):
                context.check()
                ref = ShardRef(run=job.run, key=key, rank=rank, world_size=job.world_size, digest=digest)
                try:
                    raw = client.get_manifest(ref)
                    parse_manifest(raw, digest=digest)
                except BackstayError as error:
                    context.check()
                    failures.append(str(error))
                    if isinstance(error, UnavailableError):
                        break
                    continue
                path = paths.sparse_manifest(rank, job.world_size, digest)
                write_atomically(path, raw, incarnation=context.incarnation)
                del left[rank]
        finally:
            context.release(client)
    if left:
        ranks = ", ".join(str(rank) for rank in list(left)[:5])
        raise UnavailableError(
            f"nobody has the manifests of {len(left)} ranks ({ranks}) of step {job.step}: "
            f"{failures[-1] if failures else 'nobody was asked'}",
            reason="no_manifest",
        )
