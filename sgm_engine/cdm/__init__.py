"""Classification diffusion models: a classifier of noise levels that samples, and gives the likelihood in one pass.

The networks are in models/cdm, their objective in training; here is what is said of a trained one. Imports evaluation
and everything below.
"""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "sgm_engine.models.cdm.model": ("CDM",),
        "sgm_engine.models.cdm.config": ("CDMConfig",),
        "sgm_engine.models.cdm.networks": (
            "MLP",
            "UNet",
        ),
        "sgm_engine.models.cdm.classes": ("NoiseClasses",),
        "sgm_engine.models.cdm.gaussian": ("GaussianBase",),
        "sgm_engine.models.cdm.potential": (
            "NoiseFeatures",
            "PotentialNet",
        ),
        "metropolis": (
            "Density",
            "mala",
        ),
        "likelihood": ("auroc",),
    },
)
