"""Another name of ``sgm_engine.evaluation.likelihood``."""

import sys

from sgm_engine.evaluation import likelihood

sys.modules[__name__] = likelihood
