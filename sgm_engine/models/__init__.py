"""Networks with the parameter names of their original checkpoints, and what makes a score of any network.

Imports plans, checks and kernels.
"""

from sgm_engine.models.config import ARCHITECTURES, ModelConfig
from sgm_engine.models.ncsn import NCSN, NCSNv2, NCSNv2Deeper, NCSNv2Deepest

__all__ = ["ARCHITECTURES", "NCSN", "ModelConfig", "NCSNv2", "NCSNv2Deeper", "NCSNv2Deepest"]
