"""Another name of ``sgm_engine.evaluation.likelihood``."""

import sys

from sgm_engine.evaluation import likelihood
from sgm_engine.evaluation.likelihood import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = likelihood
