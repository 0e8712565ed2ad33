"""Metrics, logs, status over HTTP."""
