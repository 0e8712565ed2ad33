"""Nested state of any tool as tensors and JSON, in memory and as one file, without pickle."""
