"""backstayd: the node daemon and the coordinator. Never imports torch."""
