"""Another name of ``sgm_engine.plans.schedule``."""

import sys

from sgm_engine.plans import schedule
from sgm_engine.plans.schedule import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = schedule
