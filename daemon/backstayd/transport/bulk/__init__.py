"""Bulk bytes between nodes over sockets of our own: client, wire format, TLS."""
