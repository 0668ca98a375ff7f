"""Training of score networks: data, objectives and a plain loop with EMA and resume."""
