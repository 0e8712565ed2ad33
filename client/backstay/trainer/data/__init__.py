"""Data loaders: which batch comes next, and how a restarted pass continues there."""
