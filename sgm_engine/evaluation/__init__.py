"""How good samples are: distances to a reference set, each with its interval. docs/evaluation.md has the tour."""
