"""Runs the GPU kernels' PTX on a CPU, every thread of it: what the compiler made of them, not what was asked of it.

Pallas' interpreter runs a kernel's text. Here Mosaic compiles it for a GPU, without one, and its PTX is executed:
shared-memory layouts, fragments of the tensor cores, barriers, asynchronous copies, every address. Warps run one at a
time in a random order, each as far as it can, and warpgroups likewise; asynchronous work lands at once or as late as
the program allows. So what only luck orders comes out wrong. Integers are exact, float operations those of NumPy
(`ex2.approx` and its like have errors of their own on a GPU). What it cannot tell: what ptxas makes of the PTX, and any
time.
"""

from . import arithmetic as arithmetic
from . import hopper as hopper
from . import memory as memory
