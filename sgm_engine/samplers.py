"""Another name of ``sgm_engine.plans.samplers``."""

import sys

from sgm_engine.plans import samplers

sys.modules[__name__] = samplers
