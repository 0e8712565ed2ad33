"""Jobs on shards of peers and of this node: fetch, verify."""
