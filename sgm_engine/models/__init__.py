"""Score networks with the parameter names of their original checkpoints."""
