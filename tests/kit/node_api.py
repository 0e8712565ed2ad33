"""The one call of the Kubernetes API that a daemon's cordon watch makes, over HTTP, with answers of the real shape."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self


class NodeApi:
    """Attributes: ``unschedulable`` by node name; ``status`` 0 answers, else it is the refusal; ``asked``: paths, in order."""

    def __init__(self) -> None:
        self.unschedulable: dict[str, bool] = {}
        self.status = 0
        self.asked: list[str] = []
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
                "users": [{"name": "test", "user": {"token": "let-me-in"}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "test"}}],
                "current-context": "here",
            }
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    api: ClassVar[NodeApi]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.api.asked.append(self.path)
        name = self.path.removeprefix("/api/v1/nodes/")
        if self.api.status:
            self._answer(self.api.status, _status(self.api.status, "Forbidden", f'nodes "{name}" is forbidden'))
        elif name not in self.api.unschedulable:
            self._answer(404, _status(404, "NotFound", f'nodes "{name}" not found'))
        else:
            self._answer(200, _node(name, is_cordoned=self.api.unschedulable[name]))

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        pass


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason,
        "code": code,
    }  # fmt: skip


def _node(name: str, *, is_cordoned: bool) -> dict[str, Any]:
    """As an API server of 1.32 has it; a node that is not cordoned has no ``unschedulable`` at all."""
    taint = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "2026-01-02T03:04:05Z"}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "uid": "6b1c",
            "resourceVersion": "4711",
            "labels": {"kubernetes.io/hostname": name},
        },
        "spec": {"podCIDR": "10.244.1.0/24", **({"unschedulable": True, "taints": [taint]} if is_cordoned else {})},
        "status": {
            "capacity": {"cpu": "96", "memory": "1056Gi"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.7"}],
        },
    }
