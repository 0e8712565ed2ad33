"""Start a real cluster of daemons on this machine and break it: for backstay's own tests, the demo, and a user's CI."""
