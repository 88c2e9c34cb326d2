"""A tool's side of `refmerge conform`: requests are lines of JSON on standard input, answers lines on standard output.

This file and the adapters beside it run in the tool's own Python, where refmerge need not be installed: they import torch
and the tool. A request is {"id", "entry", "params", "models", "base", "stats"}, arrays are {"dtype", "shape", "data"} with a
safetensors dtype and base64 of little-endian bytes. An answer is {"id"} with "tensors", "error" or "unsupported". Beside
"tensors" it may have "stages", what the steps of the method's page give: {"2": {"tau": [array, array]}}, by the names of the
vectors; an array may be a list of numbers there. The first line, unasked, is {"tool", "version", "entries"}.
"""

import base64
import json
import os
import sys

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Unsupported(Exception):
    """The tool has no way to be asked this."""


def tensor(x):
    data = bytearray(base64.b64decode(x["data"]))
    flat = torch.frombuffer(data, dtype=DTYPES[x["dtype"]]) if data else torch.empty(0, dtype=DTYPES[x["dtype"]])
    return flat.reshape(x["shape"])


def array(x):
    x = x.detach().contiguous()
    raw = x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data": base64.b64encode(raw).decode()}


def tensors(model):
    return None if model is None else {name: tensor(x) for name, x in model.items()}


def serve(tool, version, entries):
    """Answer requests until there are none. entries: name -> function(models, base, stats, **params) -> {name: tensor}."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the tool prints is no answer
    print(json.dumps({"tool": tool, "version": version, "entries": sorted(entries)}), file=out, flush=True)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"]}
        try:
            if request["entry"] not in entries:
                raise Unsupported(f"no {request['entry']}")
            models = [tensors(m) for m in request["models"]]
            stats = None if request.get("stats") is None else [tensors(s) for s in request["stats"]]
            got = entries[request["entry"]](models, tensors(request["base"]), stats, **request["params"])
            answer["tensors"] = {name: array(x) for name, x in got.items()}
        except Unsupported as reason:
            answer["unsupported"] = str(reason)
        except Exception as error:  # the tool's own, whatever it is
            answer["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(json.dumps(answer), file=out, flush=True)


class Replayed:
    """torch.bernoulli with recorded draws in place of random ones, in the order in which they are asked for."""

    def __init__(self, draws):
        self._draws, self._random = list(draws), torch.bernoulli

    def __enter__(self):
        def bernoulli(input, *args, **kwargs):
            if not self._draws:
                raise Unsupported("a random draw that was not recorded")
            return self._draws.pop(0).reshape(input.shape).to(input.dtype)

        torch.bernoulli = bernoulli

    def __exit__(self, *_):
        torch.bernoulli = self._random
