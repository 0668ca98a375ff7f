"""Score networks with the parameter names of their original checkpoints."""

from sgm_engine.models.config import ModelConfig
from sgm_engine.models.ncsn import NCSN, NCSNv2, NCSNv2Deeper, NCSNv2Deepest

ARCHITECTURES = {cls.__name__: cls for cls in (NCSN, NCSNv2, NCSNv2Deeper, NCSNv2Deepest)}

__all__ = ["ARCHITECTURES", "NCSN", "ModelConfig", "NCSNv2", "NCSNv2Deeper", "NCSNv2Deepest"]
