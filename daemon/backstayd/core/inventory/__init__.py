"""What exists where: nodes, snapshots, owners, tombstones, durable copies. Decides nothing."""
