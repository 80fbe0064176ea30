"""What a token costs: minus the logarithm of the probability that logits give it.

loss[t] = log(sum over v of exp(logits[t, v])) - logits[t, target[t]], in f32. The caller sees to it that
0 <= target < V.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, i32, log, max, sum, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, V = sp.dims("T V")


def reference(arguments: Arguments) -> dict[str, Array]:
    logits = arguments["logits"].astype(np.float64)
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    return {"loss": total - logits[np.arange(len(logits)), arguments["target"]]}


@sp.kernel
def cross_entropy(logits: Tensor[f32, T, V], target: Tensor[i32, T], loss: Tensor[f32, T]):
    for t in each(T):
        v = whole(V)
        highest = max(logits[t, v], over=v)
        total = sum(exp(logits[t, v] - highest), over=v)
        loss[t] = log(total) + highest - logits[t, target[t]]


def make_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, v = shape["T"], shape["V"]
    return {"logits": normal(random, t, v, scale=3.0), "target": random.integers(0, v, t).astype(np.int32),
            "loss": unwritten(t)}


def torch_peer(arguments: Arguments) -> Any:
    import torch

    logits, target = torch.from_numpy(arguments["logits"]), torch.from_numpy(arguments["target"].astype(np.int64))
    return lambda: torch.nn.functional.cross_entropy(logits, target, reduction="none")


KERNELS = (
    LibraryKernel(
        name="cross_entropy",
        kernel=cross_entropy,
        reference=reference,
        make_arguments=make_arguments,
        tolerance=Tolerance(2e-6, 4e-6, "the sum of V terms in f32, its logarithm, and a difference that may cancel"),
        cases=tuple(Case({"T": t, "V": v}, flops=4 * t * v, bytes=4 * t * v + 8 * t) for t, v in ((128, 49152),)),
        check_shapes=({"T": 0, "V": 3}, {"T": 1, "V": 1}, {"T": 3, "V": 17}, {"T": 5, "V": 300}),
        peers={"torch": torch_peer},
    ),
)
