"""Another name of ``sgm_engine.plans.samplers``."""

import sys

from sgm_engine.plans import samplers
from sgm_engine.plans.samplers import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = samplers
