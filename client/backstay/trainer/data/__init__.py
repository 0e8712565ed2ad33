"""Data loaders: which batch comes next, and how a restarted pass goes on there."""
