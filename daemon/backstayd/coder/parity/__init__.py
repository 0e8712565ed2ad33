"""Jobs on stripes: encode, rebuild, reuse of parity."""
