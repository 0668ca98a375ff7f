"""Another name of ``sgm_engine.plans.schedule``."""

import sys

from sgm_engine.plans import schedule

sys.modules[__name__] = schedule
