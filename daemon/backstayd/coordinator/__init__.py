"""The coordinator: drives the pure core against the transport; soft state only."""
