"""`make bench`: what snapshots cost, how fast state is protected and comes back, beside the limits of the machine.

Runs real daemons and real trainers, taking turns with memcpy, raw TCP and torch.distributed.checkpoint in the same rounds. Bars
are reported, never asserted. ``docs/benchmarks.md`` says what each figure means.
"""
