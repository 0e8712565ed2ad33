"""One rank's session with its node's daemon: attaching, trying again, slots and commits. The same for every client."""
