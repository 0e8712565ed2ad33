"""What the framework adapters (``backstay.lightning`` and the like) are made of. Imports none of the frameworks."""
