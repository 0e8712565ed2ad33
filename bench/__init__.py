"""`make bench`: what snapshots cost and how fast state is protected and restored, compared with the machine's limits.

Runs real daemons and trainers, alternating with memcpy, raw TCP and torch.distributed.checkpoint in the same rounds. Bars
are reported, never asserted. ``docs/benchmarks.md`` says what each figure means.
"""
