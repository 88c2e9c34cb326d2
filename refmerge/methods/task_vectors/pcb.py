import numpy as np

from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.sce import quotient
from refmerge.numeric import array_namespace, like, scores, total


@method("pcb", paper="arXiv:2410.02396", over="model", domain={"density": (0.0, 1.0)})
def pcb(models, base, group, *, density: float = 0.1, weight: PerModel[float] = 1.0, lambda_: float = 1.0):
    """PCB-Merging: weigh each entry of each task vector by its size within the model and by its agreement with all models.

    The best `density` of each model's entries stay, and are averaged with these weights.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. normalise
    p = normalised_products(tau, group)
    # 3. balance
    beta = balanced(p, len(tau), group)
    # 4. drop
    k = [int(density * group.size)] * len(tau)
    beta = [m_n * beta_n for m_n, beta_n in zip(group.top(*beta, k=k), beta)]
    # 5. rescale
    divisor = total(beta)
    merged = total(b_n * (w_n * tau_n) for b_n, w_n, tau_n in zip(beta, weight, tau))
    return base + lambda_ * quotient(merged, divisor)


def normalised_products(tau, group):
    """(i, j) -> Norm(tau_i tau_j), i <= j: moved and scaled to reach from 0 to 1 over the model; 1 where all are equal."""
    xp = array_namespace(*tau)
    p = {(i, j): tau[i] * tau[j] for i in range(len(tau)) for j in range(i, len(tau))}
    ends = group.max(*p.values(), *(-p_ij for p_ij in p.values()))
    spans = [(-low, high + low) for high, low in zip(ends[: len(p)], ends[len(p) :])]
    return {
        ij: (p_ij - low) / xp.full_like(p_ij, span) if span else xp.ones_like(p_ij)
        for (ij, p_ij), (low, span) in zip(p.items(), spans)
    }


def balanced(p, N, group):
    """beta_i = Softmax(N p_ii) (Softmax(p_i1) + ... + Softmax(p_iN)), each softmax over the model, and the same of p - 1."""
    powers = [exp(N * (p[i, i] - 1)) for i in range(N)] + [exp(p_ij - 1) for p_ij in p.values()]
    softmax = [(1 / z) * x for x, z in zip(powers, group.sum(*powers))]
    intra, inter = softmax[:N], dict(zip(p, softmax[N:]))
    return [intra[i] * total(inter[min(i, j), max(i, j)] for j in range(N)) for i in range(N)]


def exp(x):
    return like(np.exp(scores(x)), x)
