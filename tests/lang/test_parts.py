"""The parts around the front end: dimensions, liveness, affine proofs, source, digest, the Kernel object, exports."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, i32, kernel, tiles
from sapper.ir.types import TensorType, TileType
from sapper.lang import builtins, context
from sapper.lang.affine import Affine, extreme, fixed_when_meeting
from sapper.lang.digest import digest
from sapper.lang.dims import Dim, DimExpression, dims
from sapper.lang.errors import KernelError
from sapper.lang.liveness import analyse, assigned_names
from sapper.lang.source import SourceUnavailable, parse_function

M, N = dims("M N")


# Dimensions.


class Sizes:
    """A context that knows extents only."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def dim(self, name: str) -> int:
        return self.sizes[name]


def test_dims():
    assert dims("A") == Dim("A") and dims("A, B") == (Dim("A"), Dim("B"))
    for wrong in ("", "1x"):
        with pytest.raises(ValueError):
            dims(wrong)


def test_dim_expressions_outside_a_kernel():
    expression = (M * 2 + N - 1) // 3 % 5
    assert isinstance(expression, DimExpression)
    assert expression.evaluate({"M": 7, "N": 4}) == (7 * 2 + 4 - 1) // 3 % 5
    assert (10 - M).evaluate({"M": 3}) == 7 and (-M).evaluate({"M": 3}) == -3
    assert (7 // M).evaluate({"M": 2}) == 3 and (7 % M).evaluate({"M": 4}) == 3
    assert M + 1 == M + 1 and M + 1 != M + 2 and hash(M + 1) == hash(M + 1)
    assert repr(M * 2 + N) == "((M * 2) + N)"
    with pytest.raises(TypeError, match="only while a kernel runs"):
        int(M)
    with pytest.raises(TypeError):
        bool(M < 3)
    with pytest.raises(TypeError):
        M + 1.5


def test_dims_are_integers_in_a_run():
    with context.use(Sizes(M=7, N=4)):
        assert M + 1 == 8 and 2 * M == 14 and M // N == 1 and M % N == 3 and M - N == 3 and -M == -7
        assert M > N and M >= 7 and N < 5 and N <= 4 and M == 7 and bool(M) and M / 2 == 3.5 and 14 / M == 2
        assert list(range(N)) == [0, 1, 2, 3] and int(M + N) == 11 and float(N) == 4.0
    assert context.current() is None


# The functions of the language.


def test_builtins_reach_the_context():
    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **keywords: (name, arguments, keywords)

    with context.use(Recorder()):
        for name in builtins.UNARY_NAMES:
            assert getattr(builtins, name)(1) == (name, (1,), {})
        assert builtins.tiles(1, 2) == ("tiles", (1, 2), {})
        assert builtins.max(1, 2) == ("max", (1, 2), {"over": None})
        assert builtins.sum(1, over=2) == ("sum", (1,), {"over": 2})
        assert builtins.full(1, value=2) == ("full", (1,), {"value": 2, "dtype": None})
        assert builtins.zeros(1, dtype=f32) == ("zeros", (1,), {"dtype": f32})
        assert builtins.where(1, 2, 3) == ("where", (1, 2, 3), {})
    for name in builtins.NAMES:
        assert getattr(builtins, name).__doc__


# Liveness.


def live_of(source: str) -> list[tuple[str, ...]]:
    body = ast.parse(textwrap.dedent(source)).body
    live = analyse(body)
    return [live[node] for statement in body for node in ast.walk(statement) if isinstance(node, (ast.For, ast.If))]


def test_liveness_of_loops():
    assert live_of("""
        for i in r:
            acc += i
        """) == [("acc",)]
    assert live_of("""
        for i in r:
            x = f(i)
            g(x)
        """) == [()]
    assert live_of("""
        for i in r:
            x = f(i)
        g(x)
        """) == [("x",)]
    assert live_of("""
        for i in r:
            if c:
                x = 1
            g(x)
        """) == [("x",), ("x",)]
    assert live_of("""
        for i in r:
            for j in s:
                acc = acc + j
            out[i] = acc
            acc = 0
        """) == [("acc",), ("acc",)]
    assert live_of("""
        for i in r:
            a, b = b, a
        """) == [("a", "b")]
    assert live_of("""
        for i in r:
            x = 1
            def f(): return x
        """) == [("x",)]


def test_liveness_of_branches():
    assert live_of("""
        if c:
            x = 1
            y = 2
        else:
            x = 3
        g(x)
        """) == [("x",)]


def test_assigned_names():
    body = ast.parse("a = 1\nfor i, j in r:\n    b += 1\nif c:\n    d, (e, f) = g\nx[0] = 1\ndef h(): z = 1").body
    assert assigned_names(body) == ["a", "i", "j", "b", "d", "e", "f", "h"]


# Affine proofs.


def test_affine_arithmetic():
    form = Affine(1, {"i": 2}).plus(Affine(3, {"i": -2, "j": 1}))
    assert form == Affine(4, {"j": 1})
    assert form.times(0) == Affine(0) and form.times(2) == Affine(8, {"j": 2})
    assert Affine(0, {"i": 1}).single == "i" and Affine(1, {"i": 1}).single is None
    assert Affine(0, {"i": 2}).single is None


def test_extremes():
    ranges = {"i": (Affine(0), Affine(8)), "j": (Affine(0), Affine(1, {"i": 1}))}
    assert extreme(Affine(1, {"i": 2}), ranges.get, True) == Affine(15)
    assert extreme(Affine(1, {"i": -2}), ranges.get, True) == Affine(1)
    assert extreme(Affine(0, {"i": 1, "j": -1}), ranges.get, False) == Affine(0)
    assert extreme(Affine(-1, {"j": -1, "i": 1}), ranges.get, True) == Affine(6)
    assert extreme(Affine(0, {"i": 1, "n": 1}), ranges.get, True) == Affine(7, {"n": 1})


SPREADS = {"p": 5, "q": 3, "r": None}


ENDS = {"p": (0, 5), "q": (0, 3)}


def meets(first: list[Affine], second: list[Affine], variables: str = "p", still: str = "") -> bool:
    fixed = fixed_when_meeting(first, second, lambda s: s not in still, SPREADS.get, ENDS.get)
    return fixed is not None and not fixed.issuperset(variables)


def a(constant: int = 0, **terms: int) -> Affine:
    return Affine(constant, terms)


def test_meetings():
    assert not meets([a(p=1)], [a(p=1)])
    assert not meets([a(3, p=2)], [a(3, p=2)])
    assert meets([a(q=1)], [a(q=1)])
    assert not meets([a(p=1), a(q=1)], [a(p=1), a(q=1)], "pq")
    assert not meets([a(p=2)], [a(1, p=2)])  # even and odd
    assert meets([a(p=1)], [a(1, p=1)])  # neighbours
    assert not meets([a(0), a(q=1)], [a(1), a(q=1)])  # different rows
    assert not meets([a(p=4, q=1)], [a(p=4, q=1)])  # digits: q is below 4
    assert meets([a(p=3, q=1)], [a(p=3, q=1)])
    assert not meets([a(q=6, p=1)], [a(q=6, p=1)], "pq")
    assert meets([a(p=4, r=1)], [a(p=4, r=1)])  # r may be anything
    assert not meets([a(r=6, p=1)], [a(r=6, p=1)])
    assert not meets([a(p=1, n=1)], [a(p=1, n=1)], still="n")
    assert meets([a(p=1, n=1)], [a(p=1)], still="n")
    assert not meets([a(p=1), a(q=1, p=1)], [a(p=1), a(q=1, p=1)], "pq")
    assert not meets([a(1, n=-1)], [a(n=1)], still="n")     # 1 - n is odd where n is even
    assert meets([a(2, n=-1)], [a(n=1)], still="n")
    assert not meets([a(p=8, q=1)], [a(4, p=8, q=1)])       # q is below 4
    assert meets([a(p=8, q=1)], [a(3, p=8, q=1)])
    assert not meets([a(q=1)], [a(4, q=1)])
    assert meets([a(r=8, p=1)], [a(5, r=8, p=1)])
    assert not meets([a(r=12, p=1)], [a(6, r=12, p=1)])
    assert meets([], [])


def test_meetings_against_enumeration():
    """Whatever is said to be disjoint is, on small ranges."""
    import itertools

    forms = [a(c, **{s: k for s, k in (("p", x), ("q", y)) if k}) for c in (0, 1, 4) for x in (0, 1, 2, 4, 8)
             for y in (0, 1, -1)]
    points = list(itertools.product(range(6), range(4)))
    proofs = 0
    for first, second in itertools.product(forms, repeat=2):
        if meets([first], [second]):
            continue
        proofs += 1

        def at(form: Affine, p: int, q: int) -> int:
            return form.constant + form.terms.get("p", 0) * p + form.terms.get("q", 0) * q

        for (p, q), (p2, q2) in itertools.product(points, repeat=2):
            assert p == p2 or at(first, p, q) != at(second, p2, q2), (first, second)
    assert proofs > 20


# Source.


def long_ending(
    x,
):
    return (
        x,
    )


def test_source_places():
    parsed = parse_function(long_ending)
    assert isinstance(parsed.node, ast.FunctionDef) and parsed.node.name == "long_ending"
    place = parsed.location(parsed.node)
    with open(__file__) as file:
        assert file.read().splitlines()[place.line - 1] == "def long_ending("


def test_source_unavailable():
    world: dict[str, Any] = {}
    exec("def f(x): return x", world)
    with pytest.raises(SourceUnavailable):
        parse_function(world["f"])
    with pytest.raises(KernelError) as caught:
        exec("def g(x: f32): pass", {"f32": f32}, world)
        kernel(world["g"]).tile_ir()
    assert caught.value.kind == "source-unavailable"


def test_multi_line_strings_and_comments_in_an_indented_kernel():
    @kernel
    def k(out: Tensor[f32, M]):
        """A docstring
    that ends further left."""
# a comment at the margin
        for m in tiles(M):
            out[m] = 1.0

    assert [op.name for op in k.tile_ir().walk()].count("store") == 1


# The digest.


def digest_of(body: str = "a[m] * SCALE", header: str = "SCALE = 2.0", note: str = "") -> str:
    source = f"""\
from sapper import *
M = dims("M")
{header}
@kernel
def k(a: Tensor[f32, M], out: Tensor[f32, M]):
    {note}
    for m in tiles(M):
        out[m] = {body}
"""
    world: dict[str, Any] = {}
    exec(compile(source, "<digest>", "exec"), world)
    return digest(world["k"])


def test_digest_follows_meaning():
    base = digest_of()
    assert base == digest_of() and len(base) == 64
    assert base == digest_of(note="# a comment\n\n")
    different = [
        digest_of("a[m] + SCALE"), digest_of(header="SCALE = 3.0"), digest_of(header="SCALE = -2.0"),
        digest_of("h(a[m])", "def h(x): return x + 1"), digest_of("h(a[m])", "def h(x): return x + 2"),
        digest_of("h(a[m])", "def h(x, y=1): return x + y"), digest_of("h(a[m])", "def h(x, y=2): return x + y"),
        digest_of("h(a[m])", "c = 1\ndef h(x): return x + c"), digest_of("h(a[m])", "c = 2\ndef h(x): return x + c"),
        digest_of("a[m] * s.w", "class s: w = 1"), digest_of("a[m] * s.w", "class s: w = 2"),
        digest_of("g(s, a[m])", "class s: w = 1\ndef g(t, x): return x * t.w"),
        digest_of("g(s, a[m])", "class s: w = 2\ndef g(t, x): return x * t.w"),
        digest_of("f(a[m]) + g(a[m])", "def make(n):\n    return lambda x: x * n\nf, g = make(1), make(2)"),
        digest_of("f(a[m]) + g(a[m])", "def make(n):\n    return lambda x: x * n\nf, g = make(1), make(3)"),
        digest_of("a[m].to(T)", "T = f32"), digest_of("a[m].to(T)", "T = bf16"),
        digest_of("a[m] * t[0]", "t = (1, 2)"), digest_of("a[m] * t[0]", "t = (1, 3)"),
    ]
    assert len({base, *different}) == len(different) + 1


def test_digest_of_recursion_ends():
    assert digest_of("h(a[m])", "def h(x): return h(x)") != digest_of("h(a[m])", "def h(x): return h(x + 1)")


def test_digest_is_kept():
    @kernel
    def k(out: Tensor[f32, M]):
        out[0] = 1.0

    assert k.source_digest() is k.source_digest()


def test_digest_tells_which_tensors_may_be_one():
    """Where they may, nothing is read after it is stored by the other name."""
    def make(**options):
        @kernel(**options)
        def k(a: Tensor[f32, M], b: Tensor[f32, M], out: Tensor[f32, M]):
            for m in tiles(M):
                out[m] = a[m] + b[m]

        return k.source_digest()

    assert make(in_place=[]) == make() == make(threads=2)
    assert len({make(), make(in_place=[("out", "a")]), make(in_place=[("out", "b")]),
                make(in_place=[("out", "a"), ("out", "b")])}) == 4


def test_constants_that_change_after_the_first_call():
    """Code is kept on disk by what they were at first."""
    factor = 2.0

    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] * factor

    few, many = np.ones(3, np.float32), np.ones(3000, np.float32)
    k(few, few.copy())
    factor = 5.0
    k(few, out := few.copy())
    assert out.tolist() == [2.0] * 3
    with pytest.raises(KernelError, match="closes over has changed") as caught:
        k(many, many.copy())
    assert caught.value.kind == "constant-changed"
    factor = 2.0
    k(many, out := many.copy())
    assert set(out.tolist()) == {2.0}


# The Kernel object.


def test_kernel_object():
    @kernel(name="renamed", schedule="wide")
    def k(a: Tensor[f32, M, 4], flag: bool, n: i32 = 3):
        """What it does."""
        for m in tiles(M):
            a[m, 0] = 1.0

    assert k.name == "renamed" and k.options == {"schedule": "wide"} and k.__doc__ == "What it does."
    assert k.parameters == [("a", TensorType(f32, ("M", 4))), ("flag", TileType(sp.bool_)), ("n", TileType(i32))]
    assert k.defaults == {"n": 3} and k.source_file == __file__
    function = k.tile_ir()
    assert function.name == "renamed" and function.stage == "tile" and function.attributes == {"dims": ["M"]}
    assert "kernel renamed" in repr(k)
    assert repr(Tensor[f32, M, 4]) == "Tensor[f32, M, 4]"


def test_plain_parameters_only():
    with pytest.raises(KernelError) as caught:
        @kernel
        def k(*a):
            pass

    assert caught.value.kind == "call-arguments"


def test_launcher_hook(monkeypatch):
    calls = []

    def make(k):
        calls.append(k)
        return lambda *arguments, **options: (arguments, options)

    monkeypatch.setattr(context, "make_launcher", make)

    @kernel
    def k(n: i32):
        pass

    assert k(1, threads=2) == ((1,), {"threads": 2})
    assert k(2) == ((2,), {})
    assert calls == [k]  # made once


# The package.


def test_exports():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
        assert name in dir(sp)
    assert sp.exp is builtins.exp and sp.sum is builtins.sum
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sp.nothing  # noqa: B018


def test_import_is_light():
    """Neither NumPy nor the front end is loaded by the import, nor by defining a kernel."""
    program = textwrap.dedent("""\
        import sys
        import sapper
        assert not any(name.startswith("sapper.lang.") and name != "sapper.lang.context" for name in sys.modules)
        from sapper import Tensor, f32, kernel, dims, tiles
        M = dims("M")
        @kernel
        def k(a: Tensor[f32, M]):
            pass
        assert "numpy" not in sys.modules and "sapper.lang.frontend" not in sys.modules
        """)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
