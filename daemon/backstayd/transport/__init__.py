"""Bytes between machines: gRPC for control (nothing else imports grpc), plain sockets for bulk. Imports nothing itself."""
