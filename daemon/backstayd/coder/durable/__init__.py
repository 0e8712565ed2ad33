"""Jobs on durable storage: upload, fetch, verify, and changes of what others share."""
