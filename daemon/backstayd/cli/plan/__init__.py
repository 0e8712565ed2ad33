"""`backstay plan`: which protection a cluster and a job need."""
