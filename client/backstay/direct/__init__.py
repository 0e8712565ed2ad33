"""A rank's part of a snapshot written and read without a Snapshotter: for checkpoint tools that bring their own bytes."""
