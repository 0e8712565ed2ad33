"""Watches whether the Kubernetes node that a daemon runs on is cordoned, polling the API server from a thread of its own.

Reads one Node object (RBAC: get on nodes) and changes nothing there. While the API server is silent, the last answer holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

import kubernetes
import urllib3
from kubernetes.client.exceptions import ApiException

from backstayd.election.kubernetes_lease import api_configuration

logger = logging.getLogger(__name__)

POLL_S: Final = 3.0
CALL_S: Final = 5.0
NEXT_STEPS: Final = {
    401: "the API server does not accept the service account's credentials",
    403: "a ClusterRole must allow get on nodes, bound to this service account",
    404: "no such Node; set [node] kubernetes_node to the pod's spec.nodeName",
}


class CordonWatch:
    """Polls the Node ``name`` until it is closed.

    Args:
        on_answer: Called in the thread with each answer, True when the node is cordoned; must be quick.

    Raises:
        ConfigError: there is neither a pod's service account nor a KUBECONFIG.
    """

    def __init__(self, name: str, *, on_answer: Callable[[bool], None], poll_s: float | None = None) -> None:
        self._name = name
        self._on_answer = on_answer
        self._poll_s = POLL_S if poll_s is None else poll_s
        self._client = kubernetes.client.ApiClient(api_configuration())
        self._api = kubernetes.client.CoreV1Api(self._client)
        self._is_closed = threading.Event()
        self._logged = ""
        self._thread = threading.Thread(target=self._watch, name="cordon-watch", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def close(self) -> None:
        """Stop polling; waits for a call in progress, which has a deadline. Must not be called in the daemon's loop."""
        self._is_closed.set()
        self._thread.join(2 * CALL_S)
        self._client.close()

    def _watch(self) -> None:
        while not self._is_closed.is_set():
            try:
                node = self._api.read_node(self._name, _request_timeout=(CALL_S / 2, CALL_S))
                self._on_answer(bool(node.spec is not None and node.spec.unschedulable))
                self._log_problem("")
            except ApiException as error:
                step = NEXT_STEPS.get(error.status, "retrying")
                self._log_problem(f"the API server answers {error.status} {error.reason}: {step}")
            except (urllib3.exceptions.HTTPError, ValueError) as error:
                self._log_problem(f"the API server does not answer: {' '.join(str(error).split())[:300]}")
            except Exception:  # the boundary of a thread: the daemon keeps running, and the next poll tries again
                logger.exception("unexpected error while polling Kubernetes node %s", self._name)
            self._is_closed.wait(self._poll_s)

    def _log_problem(self, problem: str) -> None:
        if problem and problem != self._logged:
            logger.warning("Kubernetes node %s: %s; unknown whether it is cordoned", self._name, problem)
        elif self._logged and not problem:
            logger.info("Kubernetes node %s: the API server answers again", self._name)
        self._logged = problem
