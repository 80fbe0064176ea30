"""Products of what another product gives, rounded to bf16, with weights as they come or in panels, under the lane
interpreter: what is kept for the second product fits both."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, kernel, tiles, whole
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.runtime.packed import pack_array
from sapper.targets import target
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize

M, N, K, J = dims("M N K J")
MACHINES = ("cascadelake", "zen5", "graniterapids", "neoverse-v2")
ORDERS = ("tt", "tn", "nt", "nn")


def make_chain(order: str) -> Any:
    """out = bf16(x w + 1) v; order: t for weights [out, in], n for [in, out], one letter each."""
    w_dims, v_dims = (N, K) if order[0] == "t" else (K, N), (J, N) if order[1] == "t" else (N, J)
    w_turned, v_turned = order[0] == "t", order[1] == "t"

    @kernel(name=f"chain_{order}")
    def chain(x: Tensor[bf16, M, K], w: Tensor[bf16, *w_dims], v: Tensor[bf16, *v_dims], out: Tensor[f32, M, J]):
        for m in tiles(M):
            k, n, j = whole(K), whole(N), whole(J)
            made = x[m, k] @ (w[n, k] if w_turned else w[k, n])
            hidden = (made + 1.0).to(bf16)
            out[m, j] = hidden @ (v[j, n] if v_turned else v[n, j])

    return chain


def make_whole_chain(order: str) -> Any:
    """The same for all rows at once."""
    w_dims, v_dims = (N, K) if order[0] == "t" else (K, N), (J, N) if order[1] == "t" else (N, J)
    w_turned, v_turned = order[0] == "t", order[1] == "t"

    @kernel(name=f"whole_chain_{order}")
    def chain(x: Tensor[bf16, M, K], w: Tensor[bf16, *w_dims], v: Tensor[bf16, *v_dims], out: Tensor[f32, M, J]):
        for _ in each(1):
            m, k, n, j = whole(M), whole(K), whole(N), whole(J)
            hidden = (x[m, k] @ (w[n, k] if w_turned else w[k, n])).to(bf16)
            out[m, j] = hidden @ (v[j, n] if v_turned else v[n, j])

    return chain


CHAINS = {order: make_chain(order) for order in ORDERS}
WHOLE_CHAINS = {order: make_whole_chain(order) for order in ORDERS}


def run_chain(chain: Any, order: str, extents: tuple[int, int, int, int], name: str, packs: str,
              schedule: Schedule, seed: int) -> tuple[Any, Any]:
    """What a chain gives, and the hidden values' product with v."""
    m, n, k, j = extents
    random = np.random.default_rng(seed)
    plain = {"x": random.integers(-1, 2, (m, k)), "w": random.integers(-1, 2, (n, k)),
             "v": random.integers(-1, 2, (j, n))}
    turned = {"w": order[0] == "n", "v": order[1] == "n"}
    arguments = {key: np.ascontiguousarray(value.T if turned.get(key) else value).astype(ml_dtypes.bfloat16)
                 for key, value in plain.items()}
    arguments["out"] = np.zeros((m, j), np.float32)
    machine = target(name)
    packed = {key: pack_array(arguments[key], bf16, panels_of_kernel(chain, key, machine)) for key in packs}
    function = reduce_loops(chain.tile_ir())
    run_lane(function, arguments, schedule, facts_of(machine), specialize(function, arguments), packed=packed)
    hidden = plain["x"] @ plain["w"].T + (chain is CHAINS.get(order))
    return arguments["out"], hidden @ plain["v"].T


@settings(max_examples=examples(40))
@given(m=st.integers(1, 40), n=st.integers(1, 80), k=st.integers(1, 80), j=st.integers(1, 40),
       order=st.sampled_from(ORDERS), kind=st.sampled_from([CHAINS, WHOLE_CHAINS]), name=st.sampled_from(MACHINES),
       packs=st.sampled_from(["", "w", "v", "wv"]), matrix=st.sampled_from([None, False]), seed=st.integers(0, 99))
@example(24, 64, 64, 48, "tt", WHOLE_CHAINS, "graniterapids", "w", None, 0).via("columns of panels are in the lanes")
@example(24, 64, 64, 48, "tt", CHAINS, "graniterapids", "w", False, 0).via("the same of vectors")
@example(24, 64, 64, 48, "tt", CHAINS, "zen5", "v", None, 0).via("panels without slots take none that are kept")
def test_any_chain_is_exact(m, n, k, j, order, kind, name, packs, matrix, seed) -> None:
    found, wanted = run_chain(kind[order], order, (m, n, k, j), name, packs, Schedule(matrix=matrix), seed)
    np.testing.assert_array_equal(found, wanted)
