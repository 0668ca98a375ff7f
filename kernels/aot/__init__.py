"""Compilation for GPUs that are not here: what a kernel's machine code looks like, per target."""
