"""Another name of ``sgm_engine.data.images``."""

import sys

from sgm_engine.data import images

sys.modules[__name__] = images
