"""Another name of ``sgm_engine.data.images``."""

import sys

from sgm_engine.data import images
from sgm_engine.data.images import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = images
