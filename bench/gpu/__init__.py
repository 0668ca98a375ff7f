"""All about this machine's GPU by one command: ``python -m bench.gpu [--sanitize] [--out DIR] [--only STAGE …]``.

Stages, in order: build · tests · sanitize · kernels · convolutions · backends · ncu · step · end-to-end. Four run only
when asked for: --sanitize, and --only convolutions (it writes kernels/conv_table.json, the table of tuned shapes),
backends (kernels/backend_table.json, where CUDA C++ is faster than Triton) or ncu. One that fails is recorded with its
reason and the others go on; so is one that overruns its time. Writes DATE-GPU.json and .md to the output folder after
each stage; exit 0 if every stage passed, 1 if not, 2 without a GPU. Needs a source tree, torch for CUDA, Triton, a C++
compiler and nvcc; no network, no installation. Under ten minutes. docs/gpu.md has the order for a machine that is new.
"""
