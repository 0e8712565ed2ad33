"""Which snapshots are taken, encoded, kept and moved."""
