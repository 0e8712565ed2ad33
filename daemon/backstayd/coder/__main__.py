"""``python -m backstayd.coder``: started by the pool alone, with inherited descriptors; dies with its daemon."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from backstay.errors import BackstayError
from backstayd.coder.server import serve
from backstayd.security.credentials import Credentials, TlsFiles
from backstayd.security.identity import Role
from backstayd.telemetry import logs

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Parse the pool's arguments, tie this process to the daemon's life and serve."""
    parser = argparse.ArgumentParser(prog="backstayd.coder")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--memory-dir", type=Path, required=True)
    parser.add_argument("--incarnation", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--jobs-only", action="store_true", help="serve no peers")
    for name in ("cert", "key", "ca"):
        parser.add_argument(f"--tls-{name}", type=Path)
    parser.add_argument("--trust-domain", default="")
    parser.add_argument("--node", default="", help="name of this node, as its certificate states it")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--component", default="backstayd", help="who the daemon is, in its log")
    arguments = parser.parse_args()
    _die_with(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is for the daemon, which ends us
    if arguments.nice:
        os.nice(arguments.nice)
    component = f"{arguments.component} coder {os.getpid()}"
    logs.configure(level=arguments.log_level, form=arguments.log_format, component=component)
    serve(
        control_fd=arguments.control_fd,
        listen_fd=arguments.listen_fd,
        memory_dir=arguments.memory_dir,
        incarnation=arguments.incarnation,
        job_count=arguments.jobs,
        credentials=_credentials(arguments),
        is_serving=not arguments.jobs_only,
    )


def _credentials(arguments: argparse.Namespace) -> Credentials | None:
    """A coder reads the files itself, again when they change: nothing secret goes through its command line."""
    if arguments.tls_cert is None:
        return None
    files = TlsFiles(cert=arguments.tls_cert, key=arguments.tls_key, ca=arguments.tls_ca)
    try:
        return Credentials(files, trust_domain=arguments.trust_domain, role=Role.NODE, name=arguments.node)
    except BackstayError as error:  # files that are being written: the pool starts another coder soon
        logging.getLogger(__name__).error("%s", error)
        sys.exit(error.exit_code)


def _die_with(parent: int) -> None:
    """SIGKILL for this process when its parent ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(0)  # it ended before we asked


if __name__ == "__main__":
    main()
