"""Kernels of the engine, imported as ``sgm_engine.kernels``: reference, C++, Triton and CUDA versions of each op."""
