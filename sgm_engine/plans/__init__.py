"""Samplers as tables: what a step multiplies by what, row after row. Imports nothing of ours."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "plan": (
            "Plan",
            "ancestral",
            "annealed_langevin",
            "consistent_annealed",
            "ddim",
            "reverse_diffusion",
        ),
        "samplers": (
            "dpm_solver_2m",
            "euler",
            "heun",
            "plan_of_nfe",
            "predictor_corrector",
            "sa_solver",
            "sde_dpm_solver_2m",
        ),
        "schedule": (
            "cosine",
            "geometric",
            "karras",
            "linear",
            "ncsnv2",
        ),
    },
)
