from refmerge.method import method
from refmerge.methods.averaging.wise_ft import wise_ft


@method("liti", paper="arXiv:2406.16768", models=(1, 1))
def liti(models, base, *, eta: float = 0.3):
    """Linear interpolation towards initialisation, WARP's third stage: of what training or a merge did, eta stays.

    theta = (1 - eta) theta_0 + eta theta_S.
    """
    # 1. step back
    return wise_ft.run(models, base, alpha=eta)
