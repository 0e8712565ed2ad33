"""Settings of the daemons: what there is to set, where it is read from, and the pages generated from it."""
