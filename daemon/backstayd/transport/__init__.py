"""Bytes between machines: gRPC for control (nothing else imports grpc), plain sockets for bulk."""

import os

# gRPC's C core writes lines of its own about a refused connection or a taken port; our errors say the same in words.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
