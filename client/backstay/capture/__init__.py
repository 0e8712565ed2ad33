"""Capturing a snapshot: the plan of a shard, filling a slot behind the fence, the thread that commits it."""
