"""All about this machine's GPU by one command: ``python -m bench.gpu [--sanitize] [--out DIR] [--only STAGE …]``.

Stages, in order: build · tests · sanitize · kernels · backends · convolutions · ncu · end-to-end · step. Four run only
when asked for: --sanitize, and --only convolutions (it writes kernels/tables/conv.json, the table of tuned shapes),
backends (kernels/tables/backend.json, where CUDA C++ is faster than Triton) or ncu. One that fails is recorded with its
reason and the others go on; so is one that overruns its time. What measures runs in a process of its own: a kernel that
hangs or makes an illegal access costs its row. Writes DATE-GPU.json and .md to the output folder every few seconds;
exit 0 if every stage passed, 1 if not, 2 without a GPU. Needs a source tree, torch for CUDA, Triton, a C++ compiler and
nvcc; no network, no installation. Under ten minutes. docs/gpu.md has the order for a machine that is new.
"""
