"""What MLX's CPU backend needs to use several cores on Linux. On a Mac, or with a GPU, there is one lane: the usual.

Element by element MLX works on one core of the CPU, and only matrix products spread over several. So a batch is cut
into blocks, each block is computed on a stream of its own, and the products inside a block keep to one core
(`hominem_mlx.__init__` tells OpenBLAS). MLX keeps the threads of a lane as long as the process lives.
"""

import functools
import os
import sys

import mlx.core as mx

MOST = 8  # in more blocks than this too few rows are left


@functools.cache
def _streams() -> tuple[mx.ThreadLocalStream, ...]:
    cores = len(os.sched_getaffinity(0))
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(min(cores, MOST)))


def lanes() -> tuple[mx.Stream | mx.ThreadLocalStream, ...]:
    """Streams that can work at the same time: where a Linux CPU computes one a core, at most `MOST`; else one."""
    device = mx.default_device()
    if sys.platform == "linux" and device == mx.cpu:
        return _streams()
    return (mx.default_stream(device),)
