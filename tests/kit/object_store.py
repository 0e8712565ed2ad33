"""A real S3 server over HTTP (moto), in a thread of the test; processes of the test reach it too."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BUCKET = "checkpoints"


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """``environment``: what makes an S3 client of any process talk to it."""

    endpoint: str
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/runs"

    def make_bucket(self, name: str = BUCKET) -> None:
        self._ask("PUT", f"/{name}")

    def empty(self) -> None:
        """Forget every bucket, object and unfinished upload."""
        self._ask("POST", "/moto-api/reset")

    def read(self, key: str, *, bucket: str = BUCKET) -> bytes:
        return self._ask("GET", f"/{bucket}/{key}")

    def listing(self, *, bucket: str = BUCKET) -> str:
        """The XML of the bucket's listing."""
        return self._ask("GET", f"/{bucket}?list-type=2").decode()

    def unfinished(self, *, bucket: str = BUCKET) -> str:
        """The XML of the bucket's unfinished multipart uploads."""
        return self._ask("GET", f"/{bucket}?uploads").decode()

    def status(self) -> dict[str, object]:
        return dict(json.loads(self._ask("GET", "/moto-api/data.json")))

    def _ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.endpoint + path, method=method, data=data)
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running server with an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        store = ObjectStore(endpoint, environment)
        store.empty()
        store.make_bucket()
        yield store
    finally:
        server.stop()
