"""Worker processes: read peers, encode, rebuild, verify. Stateless; all state is files."""
