"""The operator's command, `backstay`."""
