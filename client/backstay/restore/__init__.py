"""Restoring: ask for the world's decision, read verified bytes, put them into the trainer's objects."""
