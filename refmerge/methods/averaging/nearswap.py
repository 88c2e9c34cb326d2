import math

from refmerge.method import method
from refmerge.numeric import array_namespace


@method("nearswap", paper="no paper: alchemonaut/QuartetAnemoi-70B-t0.0001", models=(1, 1), domain={"t": (0.0, math.inf)})
def nearswap(models, base, *, t: float = 1e-4):
    """NearSwap: entries of the base become the other model's where the two are within t, and go t towards it elsewhere."""
    theta_0, (theta_1,) = base, models
    # 1. difference
    tau = theta_1 - theta_0
    # 2. step of length t
    theta = theta_0 + t * array_namespace(tau).sign(tau)
    # 3. swap what is near
    return array_namespace(tau).where(abs(tau) <= t, theta_1, theta)
