"""Another name of ``sgm_engine.keys``."""

import sys

from sgm_engine import keys

sys.modules[__name__] = keys
