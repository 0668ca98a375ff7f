"""Another name of ``sgm_engine.plans.plan``."""

import sys

from sgm_engine.plans import plan
from sgm_engine.plans.plan import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = plan
