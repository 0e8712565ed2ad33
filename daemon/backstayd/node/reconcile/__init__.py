"""From desired state to actions on this node."""
