"""Erasure codecs behind one interface; no I/O."""
