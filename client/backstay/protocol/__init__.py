"""The local socket between a trainer and its node's daemon: message types, frames, and the client's connection."""
