"""What one node holds: slots, shards, fragments, decisions, as files on tmpfs."""
