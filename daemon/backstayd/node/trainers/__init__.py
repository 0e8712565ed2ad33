"""Trainers attached to this node: socket, sessions, requests, limits."""
