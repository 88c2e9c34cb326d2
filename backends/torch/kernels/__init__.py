"""Fast twins of methods on this backend: name -> function, called as its method is.

`kernel.ulps`: how far it may be. `kernel.into(out, flag, models, **parameters) -> bool`, if there is one: the same of whole
tensors that are on the device already, in the dtypes they have, written where the result belongs.
"""

from collections.abc import Callable
from typing import Any

from refmerge.backends.torch.kernels.linear import linear

KERNELS: dict[str, Callable[..., Any]] = {"linear": linear}
