"""A custom-kernel sampler engine for noise-conditional score models."""

__version__ = "0.1.0"
