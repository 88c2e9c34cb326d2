"""Claims about task vectors: added, taken away, trimmed, dropped, masked, patched, scaled, and stored."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from refmerge import merge
from refmerge.demo.claims.averaging import reinforce, reward, shifted
from refmerge.demo.claims.claim import Numbers
from refmerge.demo.claims.world import EPOCHS, TASKS, Split, World, compact, images, learn, right, world
from refmerge.demo.training import Weights
from refmerge.procedures.task_vectors.bitdelta_store import bitdelta_store
from refmerge.procedures.task_vectors.tall_masks_store import tall_masks_store

PLACE = {name: i for i, name in enumerate(TASKS)}


def alone(w: World, method: str, **params: Any) -> float:
    """The mean accuracy of each fine-tune with its own change made smaller in some way."""
    return w.mean([merge([m], method, base=w.base, **params) for m in w.models])


@cache
def arithmetic(seed: int) -> Numbers:
    """Sums of pairs, a difference, and an analogy."""
    w = world(seed)
    names = list(TASKS)
    share = []
    for i in range(len(names)):
        for j in range(i):
            both = merge([w.models[i], w.models[j]], "task_arithmetic", base=w.base, lambda_=0.5)
            for k in (i, j):
                test = w.tasks[names[k]].test
                share.append(right(both, test) / right(w.models[k], test))
    tau = [compact({name: m[name] - x for name, x in w.base.items()}) for m in w.models]
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(tau) for b in tau[:i]]
    away = merge([w.models[PLACE["5 to 9"]]], "task_arithmetic", base=w.base, lambda_=-1.0)
    low, high, noise = (w.tasks[name].test for name in ("0 to 4", "5 to 9", "noisy"))
    random = np.random.RandomState(seed)
    parts = {}
    for name, data in (("clean", images().train), ("noisy", w.tasks["noisy"].train)):
        for half, chosen in (("low", data.y < 5), ("high", data.y >= 5)):
            parts[name, half] = learn(w.base, data.of(chosen), random)
    related = [parts["clean", "high"], parts["noisy", "low"], parts["clean", "low"]]
    analogy = merge(related, "task_arithmetic", base=w.base, weight=[1.0, 1.0, -1.0])
    unseen = noise.of(noise.y >= 5)
    return {
        "pairs, of the fine-tunes": 100 * float(np.mean(share)),
        "cosine of task vectors": float(np.mean(cosines)),
        "base, 5 to 9": right(w.base, high), "negated, 5 to 9": right(away, high),
        "base, 0 to 4": right(w.base, low), "negated, 0 to 4": right(away, low),
        "clean 5 to 9": right(related[0], unseen), "analogy": right(analogy, unseen),
    }  # fmt: skip


@cache
def dropped(seed: int) -> Numbers:
    """Nine tenths of each fine-tune's change dropped, at random and by size."""
    w = world(seed)
    return {
        "fine-tunes": w.mean(w.models),
        "half dropped": alone(w, "dare_linear", density=0.5, lambda_=1.0, seed=seed),
        "90 % dropped": alone(w, "dare_linear", density=0.1, lambda_=1.0, seed=seed),
        "90 % dropped, not rescaled": alone(w, "dare_linear", density=0.1, lambda_=1.0, rescale=False, seed=seed),
        "20 % kept, the largest": alone(w, "ties", density=0.2),
        "half dropped, the small ones sooner": alone(w, "della", density=0.5, epsilon=0.1, lambda_=1.0, seed=seed),
    }


@cache
def sizes(seed: int) -> Numbers:
    """A fine-tune for a few epochs, and one for many on other pictures, whose change is much larger."""
    w, random = world(seed), np.random.RandomState(seed)
    short = learn(w.base, images().train, random, epochs=2)
    long = learn(w.base, w.tasks["turned"].train, random, epochs=30, rate=0.02)
    tests = [images().test, w.tasks["turned"].test]

    def both(model: Weights) -> float:
        return float(np.mean([right(model, t) for t in tests]))

    models = [short, long]
    found = {
        "widen": merge(models, "widen", base=w.base),
        "task_arithmetic": merge(models, "task_arithmetic", base=w.base, lambda_=1.0),
        "average": merge(models, "linear"),
        "ties": merge(models, "ties", base=w.base),
    }
    return {name: both(m) for name, m in found.items()}


@cache
def masks(seed: int) -> Numbers:
    w = world(seed)
    single = w.mean(w.models)
    few = range(len(TASKS))
    return {
        "fine-tunes": single,
        "tall_masks, of the fine-tunes": 100 * w.mean([w.merge("tall_masks", task=i) for i in few]) / single,
        "emr": w.mean([w.merge("emr", task=i) for i in few]),
        "ties": w.mean(w.merge("ties")),
    }


@cache
def stored(seed: int) -> Numbers:
    """Bytes of what is kept, of fine-tunes in float32."""
    w = world(seed)
    models = [{name: x.astype(np.float32) for name, x in m.items()} for m in (w.base, *w.models)]
    whole = sum(x.nbytes for x in models[0].values())
    with TemporaryDirectory() as folder:
        bits, tall = Path(folder) / "bits.safetensors", Path(folder) / "masks.safetensors"
        bitdelta_store(models[1], models[0], bits, layers=("*.weight",))
        tall_masks_store(models[1:], models[0], tall)
        sizes_ = bits.stat().st_size, tall.stat().st_size
    return {
        "fine-tunes": w.mean(w.models),
        "bitdelta": alone(w, "bitdelta", layers=("*.weight",)),
        "rank 8": alone(w, "low_rank_residual"),
        "times smaller, bitdelta": whole / sizes_[0],
        "times smaller, tall_masks": len(models) * whole / sizes_[1],
    }


@cache
def robust(seed: int) -> Numbers:
    """A robust model learned to read noise too; its signature goes into the clean model, and out again."""
    w, random = world(seed), np.random.RandomState(seed)
    clean, noise = images(), w.tasks["noisy"]
    plain = learn(w.base, clean.train, random)
    both = Split(np.concatenate([clean.train.x, noise.train.x]), np.concatenate([clean.train.y] * 2))
    strong = learn(w.base, both, random, epochs=EPOCHS)
    patched = merge([plain, strong], "rws", base=w.base)
    back = {name: x - (patched[name] - plain[name]) for name, x in patched.items()}
    return {
        "clean model": right(plain, clean.test), "clean model, noisy": right(plain, noise.test),
        "patched": right(patched, clean.test), "patched, noisy": right(patched, noise.test),
        "taken out, noisy": right(back, noise.test), "robust model, noisy": right(strong, noise.test),
    }  # fmt: skip


@cache
def scaled(seed: int) -> Numbers:
    """A fine-tune on upright digits that is scaled down in its first block."""
    w, random = world(seed), np.random.RandomState(seed)
    tuned, test = learn(w.base, images().train, random), images().test
    lines = merge([tuned], "lines", base=w.base, blocks=2, alpha=0.3, beta=0.7)
    return {
        "fine-tune": right(tuned, test), "lines": right(lines, test),
        "fine-tune, shifted": shifted(w, tuned), "lines, shifted": shifted(w, lines),
    }  # fmt: skip


@cache
def sequence(seed: int) -> Numbers:
    """The tasks learned one after another."""
    w, random = world(seed), np.random.RandomState(seed)
    models = [w.base]
    for task in w.tasks.values():
        models.append(learn(models[-1], task.train, random))
    return {
        "last of the sequence": w.mean(models[-1]),
        "magmax of the sequence": w.mean(merge(models[1:], "magmax", base=w.base)),
        "average of the sequence": w.mean(merge(models[1:], "linear")),
        "magmax, trained apart": w.mean(w.merge("magmax")),
    }


@cache
def beyond(seed: int) -> Numbers:
    """A supervised fine-tune, a short reinforcement of it, and a step further."""
    data, test = images().train, images().test
    sft = learn(world(seed).base, data.of(slice(0, 200)), np.random.RandomState(seed), epochs=5)
    (aligned,) = reinforce(sft, sft, data, np.random.RandomState(seed), beta=0.1, epochs=1)
    return {
        "aligned": reward(aligned, test),
        "extrapolated": reward(merge([aligned], "expo", base=sft, alpha=0.3), test),
    }
