"""What was measured, offline, and decides which kernel runs. Empty files: nothing was measured."""
