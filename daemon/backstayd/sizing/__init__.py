"""Computes how much memory and network a protection needs, what it survives, and how often to snapshot.

Pure: no clock, no I/O. Must not know how the numbers are entered or displayed.
"""
