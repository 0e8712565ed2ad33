"""Durable storage as files and objects: local and network file systems by the kernel, S3 and others through fsspec.

The only package that imports fsspec, and only when a URL asks for it. Must not decide what is persisted or restored.
"""
