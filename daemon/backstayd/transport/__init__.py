"""Bytes between machines: gRPC for control (the only place that imports grpc), plain sockets for bulk. Imports nothing itself."""
