"""All about this machine's GPU: ``python -m bench.gpu [--run first|second] [--sanitize] [--out DIR] [--only STAGE …]``.

--run: the two commands for a GPU that is new, of 560 s and 220 s (runs.py). Else the stages that are asked for.
Stages, in order: build · tests · sanitize · kernels · backends · convolutions · ncu · end-to-end · step. Four run only
when asked for: --sanitize, and --only convolutions (it writes kernels/tables/conv.json, the table of tuned shapes),
backends (kernels/tables/backend.json, where CUDA C++ is faster than Triton) or ncu. One that fails is recorded with its
reason and the others go on; so is one that overruns its time. What measures runs in a process of its own: a kernel that
hangs or makes an illegal access costs its row. Writes DATE-GPU.json and .md to the output folder every few seconds;
exit 0 if every stage passed, 1 if not, 2 without a GPU. Needs a source tree, torch for CUDA, Triton, a C++ compiler and
nvcc; no network, no installation. Under ten minutes. docs/gpu.md says what each command shows.
"""

import time

BEGAN = time.perf_counter()  # of the command, whose imports take their time
