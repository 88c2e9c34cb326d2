"""BLAS and LAPACK on one thread, while whole tensors are merged.

What two threads sum is rounded otherwise than what one does: with a number of threads of their own, which is the machine's,
an SVD or a product of matrices would have other bits on another machine. And each of the engine's workers would start as
many threads as there are cores. So a merge has one for each worker, and it is tensors that are computed side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["one_thread"]

_changing = threading.Lock()
_inside = 0
_limit: Any = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, BLAS and LAPACK compute on the thread that calls them, in all of this process and in those forked from it.
    The last to leave puts back what was."""
    global _inside, _limit
    from threadpoolctl import threadpool_limits

    with _changing:
        _inside += 1
        if _inside == 1:
            _limit = threadpool_limits(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _changing:
            _inside -= 1
            if _inside == 0:
                _limit.restore_original_limits()
