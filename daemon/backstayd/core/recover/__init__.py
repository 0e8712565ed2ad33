"""From a lost rank to a world that trains again."""
