"""Training on many devices: what it costs, and whether it survives."""
