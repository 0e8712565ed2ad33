"""The two parts of a Kubernetes API server that daemons use, over real HTTP: Lease objects, and whether a node is cordoned.

Written after the API's documentation, because no API server can be installed here. Leases: resourceVersion changes with every
write, a replace with a stale one is 409 Conflict, one without it is unconditional; a second create is 409 AlreadyExists; no
right is 403; what is not there is 404; a record that does not validate is 422. Nodes: answers of the shape that 1.32 gives.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

_LEASE = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/?]+)/leases(?:/([^/?]+))?(?:\?.*)?\Z")
_NODE = re.compile(r"/api/v1/nodes/([^/?]+)\Z")
# metav1.MicroTime is parsed by this layout and no other: a fraction of six digits.
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)\Z")


class KubernetesApi:
    """Attributes: ``leases`` by (namespace, name); ``unschedulable`` by name of a node; ``asked``: paths, in order.

    ``is_forbidden`` and ``is_failing`` make it refuse or fail.
    """

    def __init__(self) -> None:
        self.token = "let-me-in"
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.unschedulable: dict[str, bool] = {}
        self.asked: list[str] = []
        self.is_forbidden = self.is_failing = False
        self.lock = threading.Lock()
        self._version = 100
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def kubeconfig(self) -> str:
        """A KUBECONFIG for it; JSON is YAML."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": {"server": url}}],
                "users": [{"name": "test", "user": {"token": self.token}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "test"}}],
                "current-context": "here",
            }
        )

    def touch(self, namespace: str, name: str) -> None:
        """Somebody else writes to the lease: an annotation."""
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
    api: ClassVar[KubernetesApi]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.api.asked.append(self.path)
        if not self._is_admitted():
            return
        if node := _NODE.match(self.path):
            is_cordoned = self.api.unschedulable.get(node[1])
            found = None if is_cordoned is None else _node(node[1], is_cordoned=is_cordoned)
        else:
            key = self._lease()
            with self.api.lock:
                found = self.api.leases.get(key)
        self._answer(200, found) if found is not None else self._refuse(404, "NotFound", f"{self.path} not found")

    def do_POST(self) -> None:
        body = self._body()
        if not self._is_admitted() or not self._validate(body):
            return
        key = (self._lease()[0], body["metadata"]["name"])
        with self.api.lock:
            if key in self.api.leases:
                self._refuse(409, "AlreadyExists", f"leases {key[1]!r} already exists")
                return
            self._store(key, body)
        self._answer(201, body)

    def do_PUT(self) -> None:
        body = self._body()
        if not self._is_admitted() or not self._validate(body):
            return
        key = self._lease()
        with self.api.lock:
            found = self.api.leases.get(key)
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
        body["metadata"] |= {"namespace": key[0], "name": key[1], "resourceVersion": self.api.next_version()}
        self.api.leases[key] = body

    def _lease(self) -> tuple[str, str]:
        match = _LEASE.match(self.path)
        return (match[1], match[2] or "") if match is not None else ("", "")

    def _is_admitted(self) -> bool:
        if not (_LEASE.match(self.path) or _NODE.match(self.path)):
            self._refuse(404, "NotFound", f"the server could not find the requested resource {self.path}")
        elif self.headers.get("Authorization") != f"Bearer {self.api.token}":
            self._refuse(401, "Unauthorized", "Unauthorized")
        elif self.api.is_forbidden:
            self._refuse(403, "Forbidden", f"User cannot access resource {self.path}")
        elif self.api.is_failing:
            self._refuse(500, "InternalError", "etcdserver: request timed out")
        else:
            return True
        return False

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
            status,
            {
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
                "message": message, "code": status,
            },
        )  # fmt: skip

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _node(name: str, *, is_cordoned: bool) -> dict[str, Any]:
    """A node that is not cordoned has no ``unschedulable`` at all."""
    taint = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "2026-01-02T03:04:05Z"}
    labels = {"kubernetes.io/hostname": name}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": name, "uid": "6b1c", "resourceVersion": "4711", "labels": labels},
        "spec": {"podCIDR": "10.244.1.0/24", **({"unschedulable": True, "taints": [taint]} if is_cordoned else {})},
        "status": {
            "capacity": {"cpu": "96", "memory": "1056Gi"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.7"}],
        },
    }
