"""MLX has one random state per process; a draw of ours must neither hang on it nor move it."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside the block come from `seed`; afterwards the global state is what it was."""
    high, low = mx.random.state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)  # a seed is the two words of the state
