"""``python -m sgm_engine``: the same as the command ``sgm``."""

import sys

from sgm_engine.cli.main import main

sys.exit(main())
