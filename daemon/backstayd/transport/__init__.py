"""Bytes between machines: gRPC for control (nothing else imports grpc), sockets of our own for bulk."""

import os

# gRPC's C core writes lines of its own about a refused connection or a taken port; our errors say the same in words.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# TLS 1.3 has suites of its own. Of the older versions none is offered that works with certificates: gRPC's Python API has no
# other way to leave them out.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
