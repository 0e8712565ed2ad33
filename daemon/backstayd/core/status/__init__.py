"""What people are shown: the status document and the verdict in it."""
