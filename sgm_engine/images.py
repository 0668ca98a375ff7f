"""Another name of ``sgm_engine.outputs.images``."""

import sys

from sgm_engine.outputs import images

sys.modules[__name__] = images
