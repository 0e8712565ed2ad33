"""`backstay export` and `backstay import`: a snapshot becomes a model, a foreign checkpoint becomes a snapshot."""
