"""Durable storage on S3 and what speaks like it: multipart uploads that survive a restart, conditional writes.

Parts carry CRC32C where the server takes it. Goes through s3fs, which brings credentials, endpoint and retries.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from crc32c import crc32c

from backstay import faults
from backstay.errors import UnavailableError
from backstayd.durable.errors import NO_ROOT, explained, s3_code
from backstayd.durable.fsspec_place import FsspecPlace
from backstayd.durable.place import ShardSource

PART_BYTES: Final = 8 * 1024 * 1024
MAX_PARTS: Final = 9000  # S3 allows 10,000
PARALLEL_PARTS: Final = 4
MAX_UPLOADS: Final = 100  # unfinished ones of one name that are looked at
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NOT_KNOWN = ("NotImplemented", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "501")


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    offset: int
    length: int


class S3Place(FsspecPlace):
    """A prefix of a bucket."""

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        super().__init__(url, filesystem, path)
        self._bucket, _, self._prefix = path.partition("/")

    def put_shard(self, name: str, source: ShardSource, *, mark: str) -> bool:
        with explained("write", self._url(name)):
            if self.size_of(name) is not None:
                return False
            return _Multipart(self._fs, self._bucket, self._key(name), source).run(
                is_free=lambda: self.size_of(name) is None
            )

    def put_small(self, name: str, data: bytes) -> None:
        with explained("write", self._url(name)):
            self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        with explained("write", self._url(name)):
            try:
                self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
            except Exception as error:
                if s3_code(error) in _EXISTS:
                    return False
                if s3_code(error) not in _NOT_KNOWN:
                    raise
            else:
                return True
            if self.size_of(name) is not None:  # a store without conditional writes: look first
                return False
            self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key(name), Body=data)
            return True

    def remove(self, name: str) -> None:
        with explained("remove", self._url(name)):
            self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._key(name))

    def remove_tree(self, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        super().remove_tree(name, check=check)
        with explained("remove", self._url(name)):
            for upload in _unfinished(self._fs, self._bucket, self._key(name) + "/"):
                check()
                self._fs.call_s3(
                    "abort_multipart_upload", Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def require_root(self) -> None:
        with explained("look at", self.url):
            try:
                self._fs.call_s3("head_bucket", Bucket=self._bucket)
            except FileNotFoundError as error:
                raise UnavailableError(
                    f"cannot persist to {self.url}: the bucket {self._bucket} does not exist; create it or correct "
                    "persist_url",
                    reason=NO_ROOT,
                ) from error

    def _make_parent(self, name: str) -> None:
        """There are no directories."""

    def _remove_directory(self, name: str) -> None:
        """There are none."""

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")


class _Multipart:
    """One object on its way, part by part; parts that an earlier try has sent are compared, not sent again."""

    def __init__(self, filesystem: Any, bucket: str, key: str, source: ShardSource) -> None:
        self._fs = filesystem
        self._where = {"Bucket": bucket, "Key": key}
        self._source = source
        size = source.chunks.size_bytes
        length = max(PART_BYTES, -(-size // MAX_PARTS // (1 << 20)) * (1 << 20))
        self._parts = [
            _Part(number, offset, min(length, size - offset))
            for number, offset in enumerate(range(0, size, length), start=1)
        ]
        self._part_bytes = length
        self._buffers = threading.local()
        self._sent = itertools.count(1)
        self._has_checksum = True

    def run(self, *, is_free: Callable[[], bool]) -> bool:
        """False: an object of that name came meanwhile, and stays; ``is_free`` looks, for a store that cannot refuse."""
        upload_id, there = self._resume()
        if not upload_id:
            upload_id = self._begin()
        with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="s3-part") as pool:
            try:
                done = list(pool.map(lambda part: self._send(part, upload_id, there.get(part.number)), self._parts))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        is_new = is_free() and self._complete(upload_id, done)
        self._abort_others(upload_id if is_new else "")
        return is_new

    def _complete(self, upload_id: str, done: list[dict[str, Any]]) -> bool:
        upload = {"UploadId": upload_id, "MultipartUpload": {"Parts": done}}
        try:
            self._fs.call_s3("complete_multipart_upload", **self._where, **upload, IfNoneMatch="*")
        except Exception as error:
            if s3_code(error) in _EXISTS:
                return False
            if s3_code(error) not in _NOT_KNOWN:
                raise
            self._fs.call_s3("complete_multipart_upload", **self._where, **upload)  # without conditional writes
        return True

    def _begin(self) -> str:
        try:
            begun = self._fs.call_s3("create_multipart_upload", **self._where, ChecksumAlgorithm="CRC32C")
        except Exception as error:
            if s3_code(error) not in _NOT_KNOWN:
                raise
            self._has_checksum = False
            begun = self._fs.call_s3("create_multipart_upload", **self._where)
        return str(begun["UploadId"])

    def _resume(self) -> tuple[str, dict[int, dict[str, Any]]]:
        """The unfinished upload of this object that has most parts, and its parts."""
        best: tuple[str, dict[int, dict[str, Any]]] = ("", {})
        for upload in _unfinished(self._fs, self._where["Bucket"], self._where["Key"]):
            if upload["Key"] != self._where["Key"]:
                continue
            parts = self._list_parts(str(upload["UploadId"]))
            if not best[0] or len(parts) > len(best[1]):
                best = (str(upload["UploadId"]), parts)
        return best

    def _list_parts(self, upload_id: str) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        marker: dict[str, Any] = {}
        while True:
            page = self._fs.call_s3("list_parts", **self._where, UploadId=upload_id, **marker)
            found.update((int(part["PartNumber"]), part) for part in page.get("Parts", ()))
            if not page.get("IsTruncated"):
                return found
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _send(self, part: _Part, upload_id: str, there: dict[str, Any] | None) -> dict[str, Any]:
        """Read, verify and send one part from one buffer; or only read and compare it with what is there."""
        buffer = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(self._part_bytes))
        view = buffer[: part.length]
        if there is None or not self._is_same(part, view, there):
            self._source.spend(part.length)
            self._source.read_verified(part.offset, view)
            there = self._upload(part, view, upload_id)
        if next(self._sent) == (len(self._parts) + 1) // 2:
            chunks = self._source.chunks
            faults.reach("mid_upload", step=chunks.step, rank=chunks.rank)
        self._source.note_done(part.length)
        checksum = {"ChecksumCRC32C": there["ChecksumCRC32C"]} if there.get("ChecksumCRC32C") else {}
        return {"PartNumber": part.number, "ETag": there["ETag"], **checksum}

    def _is_same(self, part: _Part, view: memoryview, there: dict[str, Any]) -> bool:
        if int(there["Size"]) != part.length:
            return False
        self._source.read_verified(part.offset, view)
        if there.get("ChecksumCRC32C"):
            return bool(there["ChecksumCRC32C"] == _checksum(view))
        return bool(there["ETag"].strip('"') == hashlib.md5(view, usedforsecurity=False).hexdigest())

    def _upload(self, part: _Part, view: memoryview, upload_id: str) -> dict[str, Any]:
        body = bytes(view)  # botocore takes no memoryview: one copy, which the checksum below is taken of
        checksum = {"ChecksumCRC32C": _checksum(body)} if self._has_checksum else {}
        sent = self._fs.call_s3(
            "upload_part", **self._where, UploadId=upload_id, PartNumber=part.number, Body=body, **checksum
        )
        return {"ETag": sent["ETag"], **checksum}

    def _abort_others(self, upload_id: str) -> None:
        for upload in _unfinished(self._fs, self._where["Bucket"], self._where["Key"]):
            if upload["Key"] == self._where["Key"] and upload["UploadId"] != upload_id:
                self._fs.call_s3("abort_multipart_upload", **self._where, UploadId=upload["UploadId"])


def _unfinished(filesystem: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    answer = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, MaxUploads=MAX_UPLOADS)
    return list(answer.get("Uploads", ()))


def _checksum(data: bytes | memoryview) -> str:
    return base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()
