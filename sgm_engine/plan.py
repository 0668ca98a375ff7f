"""Another name of ``sgm_engine.plans.plan``."""

import sys

from sgm_engine.plans import plan

sys.modules[__name__] = plan
