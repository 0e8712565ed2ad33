"""How much memory and network a protection costs, what it survives, and how often to snapshot: arithmetic only.

Pure: no clock, no I/O. Must not know how the numbers are asked for or shown.
"""
