"""The part of a Kubernetes API server that keeps Lease objects, over real HTTP: create, read, replace, and what it refuses.

Written after the API's documentation, because no API server can be installed here: resourceVersion changes with every write,
a replace with a stale one is 409 Conflict, one without it is unconditional; a second create is 409 AlreadyExists; what is not
there is 404; no right is 403; a record that does not validate is 422.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

_PATH = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/?]+)/leases(?:/([^/?]+))?(?:\?.*)?\Z")
# metav1.MicroTime is parsed by this layout and no other: a fraction of six digits.
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)\Z")


class LeaseServer:
    """Attributes: ``leases`` by (namespace, name); ``is_forbidden`` and ``is_failing`` make it refuse or fail."""

    def __init__(self, token: str = "let-me-in") -> None:
        self.token = token
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.is_forbidden = self.is_failing = False
        self.lock = threading.Lock()
        self._version = 100
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self) -> str:
        """A KUBECONFIG for it; JSON is YAML."""
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": {"server": self.url}}],
                "users": [{"name": "test", "user": {"token": self.token}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "test"}}],
                "current-context": "here",
            }
        )

    def touch(self, namespace: str, name: str) -> None:
        """Somebody else writes to the object: an annotation."""
        with self.lock:
            self.leases[namespace, name]["metadata"]["resourceVersion"] = self.next_version()

    def next_version(self) -> str:
        self._version += 7  # opaque: nobody may count on its steps
        return str(self._version)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    server_of: ClassVar[LeaseServer]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        key = self._admit()
        if key is not None:
            with self.server_of.lock:
                found = self.server_of.leases.get(key)
            self._answer(200, found) if found is not None else self._refuse(404, "NotFound", f"{key[1]!r} not found")

    def do_POST(self) -> None:
        key, body = self._admit(), self._body()
        if key is None or not self._validate(body):
            return
        key = (key[0], body["metadata"]["name"])
        with self.server_of.lock:
            if key in self.server_of.leases:
                self._refuse(409, "AlreadyExists", f"leases {key[1]!r} already exists")
                return
            self._store(key, body)
        self._answer(201, body)

    def do_PUT(self) -> None:
        key, body = self._admit(), self._body()
        if key is None or not self._validate(body):
            return
        with self.server_of.lock:
            found = self.server_of.leases.get(key)
            if found is None:
                self._refuse(404, "NotFound", f"leases {key[1]!r} not found")
                return
            version = body["metadata"].get("resourceVersion", "")
            if version and version != found["metadata"]["resourceVersion"]:
                self._refuse(
                    409, "Conflict", "the object has been modified; please apply your changes to the latest version"
                )
                return
            self._store(key, body)
        self._answer(200, body)

    def _store(self, key: tuple[str, str], body: dict[str, Any]) -> None:
        body["metadata"] |= {"namespace": key[0], "name": key[1], "resourceVersion": self.server_of.next_version()}
        self.server_of.leases[key] = body

    def _admit(self) -> tuple[str, str] | None:
        server, match = self.server_of, _PATH.match(self.path)
        if match is None:
            self._refuse(404, "NotFound", f"the server could not find the requested resource {self.path}")
        elif self.headers.get("Authorization") != f"Bearer {server.token}":
            self._refuse(401, "Unauthorized", "Unauthorized")
        elif server.is_forbidden:
            self._refuse(403, "Forbidden", "User cannot access resource leases in API group coordination.k8s.io")
        elif server.is_failing:
            self._refuse(500, "InternalError", "etcdserver: request timed out")
        else:
            return match[1], match[2] or ""
        return None

    def _body(self) -> dict[str, Any]:
        return dict(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def _validate(self, body: dict[str, Any]) -> bool:
        spec = body.get("spec", {})
        times = [spec[name] for name in ("renewTime", "acquireTime") if name in spec]
        is_valid = (
            spec.get("leaseDurationSeconds", 1) > 0
            and spec.get("leaseTransitions", 0) >= 0
            and spec.get("holderIdentity") != ""
            and all(_MICRO_TIME.match(time) for time in times)
        )
        if not is_valid:
            self._refuse(422, "Invalid", f"Lease is invalid: spec {spec}")
        return is_valid

    def _refuse(self, status: int, reason: str, message: str) -> None:
        self._answer(
            status, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": status}
        )

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
