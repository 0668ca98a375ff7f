"""Classification diffusion models: classifiers of noise levels, whose gradient in the input is the score."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "config": ("CDMConfig",),
        "classes": ("NoiseClasses",),
        "model": ("CDM",),
        "gaussian": ("GaussianBase",),
        "potential": (
            "NoiseFeatures",
            "PotentialNet",
        ),
        "networks": (
            "MLP",
            "UNet",
        ),
    },
)
