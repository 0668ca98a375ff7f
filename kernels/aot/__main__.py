import sys

from sgm_engine.kernels.aot.compile import main

sys.exit(main(sys.argv[1:]))
