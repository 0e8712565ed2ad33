"""Leader election among coordinators: a pure elector, its driver, and the stores that can hold the lease record."""
