"""Fast twins of methods on this backend: name -> function. None is needed so far."""

from collections.abc import Callable
from typing import Any

KERNELS: dict[str, Callable[..., Any]] = {}
