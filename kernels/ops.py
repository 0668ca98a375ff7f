from sgm_engine.kernels.reference import noise_conditioned_norm  # noqa: F401
