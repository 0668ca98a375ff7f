"""Another name of ``sgm_engine.keys``."""

import sys

from sgm_engine import keys
from sgm_engine.keys import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = keys
