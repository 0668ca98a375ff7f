"""Another name of ``sgm_engine.outputs.images``."""

import sys

from sgm_engine.outputs import images
from sgm_engine.outputs.images import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = images
