"""Pure logic: events in, what should be out. Imports no I/O, clock, randomness or logging."""
