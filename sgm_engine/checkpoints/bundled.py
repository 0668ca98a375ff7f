"""The weights that come with the package, and the plan that a model's weights recommend."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgm_engine.checkpoints.good_plan import start_at, start_options
from sgm_engine.plans import plan as plans
from sgm_engine.plans.samplers import SAMPLERS, check_options

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parents[1] / "weights"
DEFAULT = "mnist"


def bundled_names() -> list[str]:
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def bundled_path(name: str = DEFAULT) -> Path:
    """The file of the bundled weights ``name``, or of the only ones that begin so; ValueError lists what there is."""
    names = bundled_names()
    found = [name] if name in names else [n for n in names if name and n.startswith(name)]
    if len(found) != 1:
        raise ValueError(f"there are no bundled weights {name!r}; there are: {', '.join(names) or 'none'}")
    return WEIGHTS / f"{found[0]}.safetensors"


def load_bundled(name: str = DEFAULT) -> tuple[nn.Module, plans.Plan]:
    """The model in evaluation mode on the CPU, and its recommended plan. The cards beside the files say whence."""
    from sgm_engine.checkpoints.checkpoint import load_checkpoint

    model = load_checkpoint(bundled_path(name))
    return model, plan_for(model)


def plan_for(model: nn.Module, name: str | None = None, **options: Any) -> plans.Plan:
    """The plan that came with the weights, with ``options`` changed; another name starts from that plan's defaults.

    The plan that came with them is the trade of their front (plans/front.py) where it keeps to the model's own levels;
    ``options`` without a name, and weights without a front, take that of their config. A model without either gets
    ``annealed_langevin`` with its defaults, those of NCSN. Under another name chains start from the data's law, or from
    the noise that a diffusion family was trained for. ValueError names an option that the plan does not take.
    """
    front = getattr(model, "front", None)
    if front is not None and name is None and not options and (own := front.on_own_levels(model.sigmas)) is not None:
        return own.named("good").plan(partial(start_at, model)).on_levels(model.sigmas)
    recommended = dict(getattr(model, "plan", None) or {})
    own_name = recommended.pop("name", "annealed_langevin")
    name = name or own_name
    if name not in SAMPLERS:
        raise ValueError(f"plan must be one of {', '.join(SAMPLERS)}, got {name!r}")
    check_options(name, options)
    if name != own_name:
        recommended = start_options(model, name, float(model.sigmas[0]))
    return SAMPLERS[name](model.sigmas, **recommended | options)
