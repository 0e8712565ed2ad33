"""The node daemon: sessions of trainers, reconciliation, the link to the coordinator."""
