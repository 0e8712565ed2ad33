"""`backstay export` and `backstay import`: a snapshot out as a model, a checkpoint of others in as a snapshot."""
