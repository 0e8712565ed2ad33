"""Answers to ranks that restore or read: files, offers, chunks."""
