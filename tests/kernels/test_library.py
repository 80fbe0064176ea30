"""Every library kernel against its NumPy reference: run eagerly, as tile IR, and by an ordinary call."""

from typing import Any

import numpy as np
import pytest

from sapper.kernels import find, library
from sapper.kernels.record import LibraryKernel
from sapper.tile import eager, interpret
from tests.kernels import shapes
from tests.strategies.amount import FUZZ

LIBRARY = library()


def check(entry: LibraryKernel, shape: dict[str, int]) -> Any:
    return pytest.param(entry, shape, id=f"{entry.name}-{'-'.join(f'{k}{v}' for k, v in shape.items())}")


CHECKS = [check(entry, shape) for entry in LIBRARY for shape in entry.check_shapes]


def arguments_and_expected(entry: LibraryKernel, shape: dict[str, int]) -> tuple[dict, dict]:
    arguments = entry.make_arguments(np.random.default_rng(7), shape)
    assert list(arguments) == [name for name, _ in entry.kernel.parameters]
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    return arguments, expected


def assert_near(entry: LibraryKernel, arguments: dict, expected: dict) -> None:
    wrong = entry.compare(arguments, expected)
    assert wrong is None, wrong


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("entry", "shape"), CHECKS)
def test_eager(entry: LibraryKernel, shape: dict[str, int]) -> None:
    arguments, expected = arguments_and_expected(entry, shape)
    eager.run(entry.kernel, arguments)
    assert_near(entry, arguments, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_eager_does_not_depend_on_the_tile_size(entry: LibraryKernel) -> None:
    shape = entry.check_shapes[len(entry.check_shapes) // 2]
    arguments, expected = arguments_and_expected(entry, shape)
    eager.run(entry.kernel, arguments, tile_sizes=5)
    assert_near(entry, arguments, expected)


def raced(entry: LibraryKernel) -> dict[str, int]:
    """The shape at which it is checked that no iterations race, which takes long."""
    small = [shape for shape in entry.check_shapes if all(extent <= 34 for extent in shape.values())]
    return small[-1] if np.prod([max(1, e) for e in small[-1].values()]) < 5000 else small[-2]


def interpreted(entry: LibraryKernel) -> list[dict[str, int]]:
    """The shape at which races are looked for, and every fourth of the others; in a search for faults all."""
    race = raced(entry)
    return [race, *[shape for shape in entry.check_shapes if shape != race][::1 if FUZZ else 4]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("entry", "shape"), [check(entry, shape) for entry in LIBRARY for shape in interpreted(entry)])
def test_tile_ir(entry: LibraryKernel, shape: dict[str, int]) -> None:
    """At one shape also that no iterations of parallel loops race."""
    arguments, expected = arguments_and_expected(entry, shapes.interpreted(entry, shape))
    interpret.interpret(entry.kernel.tile_ir(), arguments, check_races=shape == raced(entry))
    assert_near(entry, arguments, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_tile_ir_does_not_depend_on_the_tile_size(entry: LibraryKernel) -> None:
    shape = entry.check_shapes[len(entry.check_shapes) // 2]
    arguments, expected = arguments_and_expected(entry, shape)
    interpret.interpret(entry.kernel.tile_ir(), arguments, tile_sizes=7)
    assert_near(entry, arguments, expected)


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_the_outer_loops_are_parallel(entry: LibraryKernel) -> None:
    """Rows, heads and output tiles are for the cores to take; only the sort of a few tokens, the list of chosen
    positions and the cuts of shares are chains, and one vector's norm is too small to share."""
    loops = [op for op in entry.kernel.tile_ir().body.ops if op.name in ("tiles", "each")]
    chains = ("group_tokens", "list_positions", "share_tokens")
    if entry.name.startswith("rms_norm_quantize_groups") or entry.name in chains:
        return
    assert loops
    assert all(op.attributes["parallel"] for op in loops)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("entry", "shape"), CHECKS)
def test_call(entry: LibraryKernel, shape: dict[str, int], proved_code: None) -> None:
    """As a user calls it: compiled, or interpreted if SAPPER_INTERPRET=1. tests/codegen calls each kernel at more."""
    pytest.importorskip("sapper.codegen.pipeline", reason="there is no compiler")
    arguments, expected = arguments_and_expected(entry, shape)
    entry.kernel(*arguments.values())
    assert_near(entry, arguments, expected)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_call_under_the_interpreter(entry: LibraryKernel) -> None:
    """A call reaches the interpreter, which `test_tile_ir` runs at every shape."""
    arguments, expected = arguments_and_expected(entry, entry.check_shapes[len(entry.check_shapes) // 2])
    entry.kernel(*arguments.values(), interpret=True)
    assert_near(entry, arguments, expected)


def test_names_are_unique_and_found() -> None:
    names = [entry.name for entry in LIBRARY]
    assert len(set(names)) == len(names)
    assert find("softmax") is next(entry for entry in LIBRARY if entry.name == "softmax")
    with pytest.raises(KeyError, match=r"no library kernel 'sofmax'; .* mend: did you mean softmax"):
        find("sofmax")


class Zeros(np.ndarray):
    """Zeros that stay so, in memory that nobody touches."""

    def __mul__(self, factor):  # type: ignore[no-untyped-def]
        return self

    def astype(self, dtype, **_):  # type: ignore[no-untyped-def]
        return np.zeros(self.shape, dtype)


class ZeroNormals(np.random.Generator):
    """A generator for arguments of which only the sizes matter: those of a case take seconds to draw, and to fill."""

    def standard_normal(self, size=None, dtype=np.float64, out=None):  # type: ignore[no-untyped-def]
        return np.zeros(size, dtype).view(Zeros)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_cases_name_what_they_cost(entry: LibraryKernel) -> None:
    """The floor of each case counts every argument once: a cache only as far as it is filled or written, of a
    token's experts those that it takes, of masked groups the rows that they have, and no rows that room is made for."""
    assert entry.cases
    for case in entry.cases:
        assert case.flops >= 0
        assert case.bytes > 0
        assert set(case.shape) == set(entry.check_shapes[0])
    parts = ("attention", "embedding", "rope", "rotate", "compress", "cache_index", "index_scores", "gather_positions",
             "gather_pages", "gather_latents", "expert_", "masked_")
    if any(part in entry.name for part in parts):
        return
    case = min(entry.cases, key=lambda case: case.bytes)
    rows = case.shape.get("M", case.shape.get("J"))
    shape = case.shape | ({"C": rows} if "C" in case.shape and rows is not None else {})
    arguments = entry.make_arguments(ZeroNormals(np.random.PCG64(1)), shape)
    assert case.bytes == sum(a.nbytes for a in arguments.values() if isinstance(a, np.ndarray))


def test_a_wrong_result_is_found() -> None:
    entry = find("vector_add")
    arguments, expected = arguments_and_expected(entry, {"N": 10})
    arguments["c"][...] = expected["c"]
    assert entry.compare(arguments, expected) is None
    arguments["c"][3] += 1e-3
    assert "c[3]" in (entry.compare(arguments, expected) or "")
    assert "1 of 10" in (entry.compare(arguments, expected) or "")


@pytest.mark.parametrize(("entry", "name"), [
    (entry, name) for entry in LIBRARY for name in entry.peers
], ids=lambda value: getattr(value, "name", value))
def test_peers_run(entry: LibraryKernel, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    arguments, _ = arguments_and_expected(entry, entry.check_shapes[-1])
    entry.peers[name](arguments)()


def test_softmax_of_hostile_rows() -> None:
    """Minus infinity has no weight, a row of nothing else is NaN, and large values do not overflow."""
    x = np.array(
        [[0.0, -np.inf, 0, 0], [1e30, 1.0, 1e30, -9], [0.0, np.nan, 1, 2], [-np.inf] * 4, [0.0, 3e-39, 0, 0]],
        dtype=np.float32,
    )
    y = np.full_like(x, -1)
    eager.run(find("softmax").kernel, (x, y))
    np.testing.assert_allclose(y[0], [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(y[1], [0.5, 0, 0.5, 0])
    assert np.isnan(y[2:4]).all()
    np.testing.assert_allclose(y[4], 0.25, rtol=1e-6)


def test_sampling_takes_every_candidate_in_turn() -> None:
    """One row for each draw; all candidates, none of them left out by its probability."""
    draws = ((0.0, 7), (0.49, 7), (0.51, 3), (0.74, 3), (0.76, 9), (0.87, 9), (0.88, 1), (0.9999999, 1))
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    u = np.array([u for u, _ in draws], np.float32)

    def tokens(temperature: float) -> list[int]:
        ones = np.ones(len(draws), np.float32)
        token = np.zeros(len(draws), np.int32)
        values = np.tile(row, (len(draws), 1))
        indices = np.tile(np.array([7, 3, 9, 1], np.int32), (len(draws), 1))
        eager.run(find("sample").kernel, (values, indices, np.full(len(draws), 4, np.int32),
                                          ones * np.float32(temperature), ones, ones * 0, u, token))
        return token.tolist()

    assert tokens(1.0) == [token for _, token in draws]
    assert tokens(1e-3) == [7] * len(draws)  # Nearly greedy when it is cold.


def test_attention_sees_what_changed_since_the_call_before() -> None:
    """Copies of values that stay for other queries are of one call."""
    entry = find("attention_bf16_64")
    arguments, _ = arguments_and_expected(entry, {"T": 300, "H": 1, "G": 1, "position": 20})
    for factor in (1.0, 2.0):
        arguments["values"] *= np.array(factor, arguments["values"].dtype)
        with np.errstate(all="ignore"):
            expected = entry.reference(arguments)
        entry.kernel(*arguments.values(), threads=1)
        assert_near(entry, arguments, expected)


def test_attention_matches_decode_token_by_token() -> None:
    """Prefill of four tokens is the same as decoding them one after the other over one cache."""
    random = np.random.default_rng(3)
    arguments = find("attention_f32").make_arguments(random, {"T": 4, "H": 2, "G": 2, "D": 8, "position": 3})
    eager.run(find("attention_f32").kernel, arguments)
    for t in range(4):
        out = np.zeros((2, 2, 8), dtype=np.float32)
        eager.run(
            find("attention_decode_f32").kernel,
            (arguments["q"][t], arguments["keys"], arguments["values"], 3 + t, arguments["scale"], out),
        )
        np.testing.assert_allclose(out, arguments["out"][t], rtol=1e-5, atol=1e-6)
