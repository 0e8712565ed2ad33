"""Message types exchanged between daemons and the coordinator: frozen values only."""
