"""A GPU's machine-level programs run without a GPU: an interpreter of the PTX that this project's kernels compile to.

program.py reads PTX; machine.py runs it, all threads of many blocks side by side; memory.py and races.py check every
access; the instructions are in arithmetic.py, logic.py, moves.py, warps.py, copies.py and matrices.py. launches.py and
cuda_library.py put it in the place of a GPU under the tests of tests/kernels.

What it shows: results, accesses out of bounds or misaligned, shared memory that is read before it is written, races of
threads in it, barriers that not all threads reach, copies that are read before they are waited for.
What it does not: time; what ptxas and the hardware make of PTX (registers, SASS, contraction of mul and add without a
rounding); fences of the asynchronous proxy; races between blocks in global memory; the order and the width in which a
tensor core adds; accumulators of wgmma that are read before they are waited for.
"""
