"""Search for the plan that gives the best samples for a budget of evaluations. docs/evaluation.md has the tour."""
