"""Snapshots in other people's formats: out as a Hugging Face model, in from checkpoints of others. No daemon is talked to."""
