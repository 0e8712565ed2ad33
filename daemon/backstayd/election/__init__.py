"""Which of several coordinators leads: a pure elector, the process around it, and the stores a record can be kept in."""
