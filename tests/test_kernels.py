"""Kernels and their torch twins against float64 numpy; on a CPU the kernels run interpreted."""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hetlora_agg.errors import InputTypeError, InputValueError, OptionValueError
from hetlora_agg.linalg import kernels
from hetlora_agg.linalg.kernels import available, jacobi, ragged_gram, ragged_output, selected
from hetlora_agg.linalg.kernels.ragged import columns_of, power_below
from tolerance import eps

# The functions carry their modules' names, so the modules are fetched by path.
PACKAGE = "hetlora_agg.linalg.kernels"
backend_module, gram_module, jacobi_module, triton_module = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in ("backend", "ragged_gram", "jacobi", "_triton")
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = eps(F64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# There conftest.py has set TRITON_INTERPRET.
INTERPRETED = DEVICE == "cpu"

needs_triton = pytest.mark.skipif(not available(DEVICE), reason="triton is not installed")
every_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=needs_triton)]
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Triton 3.6 under numpy ≥ 2.4 (triton#9171): its scalars are arrays of one, no longer ints."""
    if not INTERPRETED or find_spec("triton") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    kind = type(importlib.import_module("triton.language").sum)
    assert kind is interpreter.InterpretedFunction, "triton was imported before TRITON_INTERPRET"
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def blocks_of(members, length, ranks, dtype=F32, seed=0):
    return [normal(members, length, r, seed=seed + r).to(dtype) for r in ranks]


def turned(blocks):
    """The same values lying the other way: what callers pass for A."""
    return [block.mT.contiguous().mT for block in blocks]


def scaled(blocks, scales):
    return [block * s for block, s in zip(blocks, scales, strict=True)]


def with_zero_columns(blocks):
    for block in blocks:
        block[..., ::3] = 0
    return blocks


PLAIN = blocks_of(3, 70, (1, 7, 16, 33, 30))
R_PLAIN = 87
SIGNED = normal(3, R_PLAIN, seed=5)
SIGNED[:, ::4] = 0

# name → (blocks, share)
CASES = {
    "one column": (blocks_of(1, 5, (1,)), None),
    "one row": (blocks_of(2, 1, (2, 3)), None),
    "ragged": (PLAIN, None),
    "lying the other way": (turned(PLAIN), None),
    "half one way, half the other": (PLAIN[:2] + turned(PLAIN[2:]), None),
    "wide accesses across": (blocks_of(2, 64, (8, 4, 16)), None),
    "wide accesses down": (turned(blocks_of(2, 64, (3, 8))), None),
    "one member for all": ([block[:1].expand(3, -1, -1) for block in PLAIN[:3]], None),
    "one row for all": ([block[:, :1].expand(-1, 40, -1) for block in PLAIN[:2]], None),
    "every other row and column": ([block[:, ::2, 1::2] for block in PLAIN[1:3]], None),
    "float16": (blocks_of(1, 50, (3, 8), F16), None),
    "bfloat16": (turned(blocks_of(1, 50, (3, 8), BF16)), None),
    "float64": (blocks_of(2, 50, (3, 8), F64), None),
    "shares with signs and zeros": (PLAIN, SIGNED),
    "tiny and huge shares": (PLAIN[:2], torch.tensor([1e-200, 1e30], dtype=F64).repeat(3, 4)),
    "zero columns": (with_zero_columns(blocks_of(2, 40, (5, 4))), None),
    "nothing but zeros": ([torch.zeros(2, 40, 3)], None),
    "float32 of any size": (scaled(blocks_of(2, 40, (2, 3)), (1e-20, 1e18)), None),
    "float64 of any size": (
        scaled(blocks_of(1, 40, (2, 3, 4), F64), (1e-300, 1e300, 1e-315)),
        torch.ones(1, 9, dtype=F64),
    ),
}
every_case = pytest.mark.parametrize(("blocks", "share"), CASES.values(), ids=CASES.keys())


def on_device(blocks, share):
    # Strides are part of the case: `to` keeps those of dense tensors, and a CPU's are left alone.
    moved = [block.to(DEVICE) for block in blocks]
    return moved, None if share is None else share.to(DEVICE)


def array(X):
    return X.detach().cpu().double().numpy()


def dense(blocks):
    return np.concatenate([array(block) for block in blocks], -1)


def oracle_gram(blocks, share):
    X = dense(blocks)
    share = np.ones(X.shape[::2]) if share is None else array(share)
    peak = np.abs(X).max(-2)
    # in two steps, since 1/peak leaves float64 where peak is subnormal
    half = np.sqrt(np.where(peak > 0, peak, 1.0))[:, None]
    X = X / half / half
    length = np.sqrt((X**2).sum(-2))
    norm = length * peak * np.abs(share)
    X = X * np.where(norm > 0, np.sign(share) / np.where(length > 0, length, 1), 0)[:, None]
    G = np.einsum("mij,mik->mjk", X, X)
    G[:, range(G.shape[-1]), range(G.shape[-1])] = 1
    return G, norm


def gram_gate(blocks):
    """(length + 8)ε: the sum of length products of unit columns, and their normalisation."""
    return (blocks[0].shape[-2] + 8) * EPS


@every_backend
@every_case
def test_gram(blocks, share, backend):
    oracle, norms = oracle_gram(blocks, share)
    blocks, share = on_device(blocks, share)
    G, norm = ragged_gram(blocks, share, backend=backend)
    gate = gram_gate(blocks)
    assert G.dtype == norm.dtype == F64
    np.testing.assert_allclose(array(G), oracle, rtol=0, atol=gate)
    # a subnormal entry has no relative accuracy to keep
    np.testing.assert_allclose(array(norm), norms, rtol=gate, atol=4e-323)
    assert torch.equal(G, G.mT)
    assert (G.diagonal(dim1=-2, dim2=-1) == 1).all()
    for j in (norm == 0).nonzero().tolist():
        assert G[j[0], j[1]].count_nonzero() == 1


@every_backend
def test_small_arguments_may_lie_any_way(backend):
    blocks, share = on_device(PLAIN, SIGNED)
    G, norm = ragged_gram(blocks, share, backend=backend)
    other = ragged_gram(blocks, share.T.contiguous().T, backend=backend)
    assert torch.equal(other.G, G)
    assert torch.equal(other.norm, norm)
    lower = matrices(5)[4:7].tril().to(DEVICE)
    solved = jacobi(lower, backend=backend)
    other = jacobi(lower.mT.contiguous().mT, backend=backend)
    assert torch.equal(other.vectors, solved.vectors)


@needs_triton
@pytest.mark.parametrize("slices", [1, 2, 5])
def test_gram_in_slices(slices):
    blocks, _ = on_device(PLAIN[1:3], None)
    # five slices of one step each for three steps of rows: two are empty
    G, norm = gram_module.ragged_gram_triton(blocks, slices=slices)
    oracle, norms = oracle_gram(blocks, None)
    np.testing.assert_allclose(array(G), oracle, rtol=0, atol=gram_gate(blocks))
    np.testing.assert_allclose(array(norm), norms, rtol=gram_gate(blocks))
    again = gram_module.ragged_gram_triton(blocks, slices=slices)
    assert torch.equal(G, again.G)
    assert torch.equal(norm, again.norm)


def test_slices_fill_the_device_with_rows_enough_in_each(monkeypatch):
    class Properties:
        multi_processor_count = 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert gram_module._slices(1, 4096, cuda) == 4096 // gram_module.SLICE_ROWS
    assert gram_module._slices(60, 4096, cuda) == 4
    assert gram_module._slices(10_000, 4096, cuda) == 1
    assert gram_module._slices(1, 4096, torch.device("cpu")) == 1


@every_backend
def test_gram_lets_what_is_not_finite_through(backend):
    blocks = blocks_of(2, 40, (2, 3))
    blocks[1][0, 7, 1] = float("nan")
    blocks[0][1, 3, 0] = float("inf")
    blocks, _ = on_device(blocks, None)
    with np.errstate(invalid="ignore"):
        G, norm = ragged_gram(blocks, backend=backend)
    assert norm.isfinite().tolist() == [[True, True, True, False, True], [False] + [True] * 4]
    assert not G[0, 3, 0].isfinite()
    assert G[0, :3, :3].isfinite().all()


@every_backend
@every_case
def test_output(blocks, share, backend):
    R = sum(block.shape[-1] for block in blocks)
    M = normal(blocks[0].shape[0], R, 5, seed=3)
    X = dense(blocks) * (1 if share is None else array(share)[:, None])
    wanted, size = X @ array(M), np.abs(X) @ np.abs(array(M))
    blocks, share = on_device(blocks, share)
    dtype = F64 if blocks[0].dtype == F64 else F32
    out = ragged_output(blocks, M.to(DEVICE), share, backend=backend)
    assert out.dtype == dtype
    assert out.is_contiguous()
    # R float64 additions and products, one rounding for the share, one to the result's dtype
    allowed = (R + 3) * EPS * size + eps(dtype) * np.abs(wanted)
    assert (np.abs(array(out) - wanted) <= allowed).all()


@needs_triton
def test_output_in_several_tiles_and_repeats():
    blocks, _ = on_device(turned(PLAIN), None)
    M = normal(3, 70, R_PLAIN, seed=4).to(DEVICE).mT
    first, second = (ragged_output(blocks, M, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    twin = ragged_output(blocks, M, backend="torch")
    np.testing.assert_allclose(array(first), array(twin), rtol=eps(F32), atol=1e-12)


@every_case
def test_columns_are_found(blocks, share):
    table, _, _ = columns_of(blocks)
    members, length, _ = blocks[0].shape
    size, base = blocks[0].element_size(), blocks[0].data_ptr()
    # the kernel's address of entry (m, i, j), against the address of that entry in its block
    m, i = torch.arange(members)[:, None, None], torch.arange(length)[:, None]
    at = base + size * (table[0] + m * table[1] + i * table[2])
    own = [
        block.data_ptr()
        + size
        * (
            m * block.stride(0)
            + i * block.stride(1)
            + torch.arange(block.shape[2]) * block.stride(2)
        )
        for block in blocks
    ]
    assert torch.equal(at, torch.cat(own, -1))


@pytest.mark.parametrize(
    ("name", "unit_rows", "vector"),
    [
        ("ragged", False, 1),
        ("wide accesses across", False, 4),
        ("wide accesses down", True, 4),
        ("half one way, half the other", False, 1),
        ("every other row and column", False, 1),
    ],
)
def test_wide_accesses_are_promised_only_where_they_fit(name, unit_rows, vector):
    columns = columns_of(CASES[name][0])
    assert (columns.unit_rows, columns.vector) == (unit_rows, vector)


def test_power_below():
    peak = torch.tensor([0.0, 1.0, 1.5, 2.0, 3e-308, 1.7e308, 1e-320], dtype=F64)
    power = [1.0, 1.0, 1.0, 2.0, 2.0**-1022, 2.0**1023, 2.0**-1000]
    power[4] = 2.0**-1000
    assert power_below(peak).tolist() == power


def symmetric(values, seed=0):
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return (Q * values) @ Q.mT


def matrices(R):
    column = normal(R, 1, seed=R)
    half = torch.arange(R, dtype=F64).div(2, rounding_mode="floor")
    return torch.stack(
        [
            torch.eye(R, dtype=F64),
            symmetric(half, seed=1),
            symmetric(torch.logspace(0, -12, R, dtype=F64), seed=2),
            torch.zeros(R, R, dtype=F64),
            column @ column.mT,
            torch.diag(normal(R, seed=3)),
            symmetric(normal(R, seed=4), seed=5),
            1e200 * symmetric(1 + half, seed=6),
            1e-200 * symmetric(1 + half, seed=7),
            torch.diag(normal(R, seed=8)) + 1e-160 * column @ column.mT,
        ]
    )


def assert_eigenpairs(G, solved):
    """Orthogonal within 1e-13·R; residual and eigenvalues within 1e-13·R·‖G‖, ten sweeps of Rε."""
    values, vectors, converged = (X.cpu() for X in solved)
    assert converged.all()
    R = G.shape[-1]
    size = np.array([np.linalg.norm(matrix / (np.abs(matrix).max() or 1)) for matrix in array(G)])
    size *= np.abs(array(G)).max((-2, -1))
    gate = 1e-13 * R * size
    V, w = array(vectors), array(values)
    turns = np.linalg.norm(np.swapaxes(V, -2, -1) @ V - np.eye(R), axis=(-2, -1))
    assert (turns <= 1e-13 * R).all()
    unit = np.where(size > 0, size, 1)
    residual = (array(G) / unit[:, None, None]) @ V - V * (w / unit[:, None])[:, None]
    assert (np.linalg.norm(residual, axis=(-2, -1)) <= 1e-13 * R).all()
    assert (np.diff(w) >= 0).all()
    assert (np.abs(w - np.linalg.eigvalsh(array(G))).max(-1) <= gate).all()


@pytest.mark.parametrize("R", [1, 2, 3, 16, 33, 64])
def test_jacobi_in_torch(R):
    G = matrices(R).to(DEVICE)
    assert_eigenpairs(G, jacobi(G, backend="torch"))


# The interpreter takes milliseconds per round of rotations.
@needs_triton
@pytest.mark.parametrize(
    ("R", "which"), [(1, slice(None)), (2, slice(None)), (5, slice(None)), (6, [2, 4]), (19, [2])]
)
def test_jacobi_in_triton(R, which):
    G = matrices(R)[which].to(DEVICE)
    with np.errstate(over="ignore"):
        solved, again = jacobi(G, backend="triton"), None
        if R == 2:
            again = jacobi(G, backend="triton")
    assert_eigenpairs(G, solved)
    if again is not None:
        assert torch.equal(solved.vectors, again.vectors)
    twin = jacobi(G, backend="torch")
    gate = 1e-13 * R * G.abs().amax((-2, -1))[:, None]
    assert ((solved.values - twin.values).abs() <= gate).all()


@every_backend
def test_jacobi_reads_the_lower_triangle(backend):
    G = matrices(4)[6:7].to(DEVICE)
    spoiled = G.tril() + torch.full_like(G, 7.0).triu(1)
    values, vectors, _ = jacobi(G, backend=backend)
    other = jacobi(spoiled, backend=backend)
    assert torch.equal(other.values, values)
    assert torch.equal(other.vectors, vectors)


@every_backend
def test_jacobi_says_who_did_not_converge(backend, monkeypatch):
    G = matrices(4)[[6, 6, 0]].to(DEVICE)
    G[1, 2, 1] = float("nan")
    with np.errstate(invalid="ignore"):
        solved = jacobi(G, backend=backend)
    assert solved.converged.tolist() == [True, False, True]
    assert_eigenpairs(G[::2], [X[::2] for X in solved])
    monkeypatch.setattr(jacobi_module, "MAX_SWEEPS", 1)
    assert jacobi(G[::2], backend=backend).converged.tolist() == [False, True]


def calls():
    """Every kernel by name, called with a backend on small CPU tensors."""
    blocks, M = [torch.ones(1, 4, 2)], torch.ones(1, 2, 3, dtype=F64)
    return {
        "ragged_gram": lambda backend: ragged_gram(blocks, backend=backend),
        "ragged_output": lambda backend: ragged_output(blocks, M, backend=backend),
        "jacobi": lambda backend: jacobi(torch.eye(3, dtype=F64)[None], backend=backend),
    }


every_kernel = pytest.mark.parametrize("name", calls())


@every_kernel
def test_auto_is_torch_while_nothing_is_measured(name, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("launched")

    assert not kernels.MEASURED_WINS
    assert not selected(name, "cuda")
    monkeypatch.setattr(triton_module, "compiled", never)
    calls()[name]("auto")


def test_a_measured_win_is_taken_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(backend_module, "MEASURED_WINS", {"jacobi": "a row"})
    monkeypatch.setattr(backend_module, "available", lambda device_type: True)
    assert selected("jacobi", "cuda")
    assert not selected("jacobi", "cpu")
    assert not selected("ragged_gram", "cuda")


def test_available(monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (available("cpu"), available("cuda")) == (True, False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert (available("cpu"), available("cuda")) == (False, True)
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    assert not available("cuda")


@every_kernel
def test_without_triton(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(OptionValueError, match=rf"{name}: .*`pip install triton`"):
        calls()[name]("triton")
    calls()[name]("auto")


@every_kernel
def test_on_a_device_triton_does_not_run_on(name, monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(OptionValueError, match=rf"{name}: .*got cpu with the interpreter off"):
        calls()[name]("triton")


@every_kernel
def test_unknown_backend(name):
    with pytest.raises(OptionValueError, match=f"{name}: unknown backend 'tritn'; did you mean"):
        calls()[name]("tritn")


X, M = torch.ones(2, 4, 3), torch.ones(2, 3, 2, dtype=F64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ragged_gram([]), InputValueError, "at least one block"),
        (lambda: ragged_gram([X, "X"]), InputTypeError, "block 1: .*got str"),
        (lambda: ragged_gram([X.int()]), InputTypeError, "block 0: .*int32"),
        (lambda: ragged_gram([X, X.double()]), InputTypeError, "block 1 is torch.float64"),
        (lambda: ragged_gram([X, X.to("meta")]), InputTypeError, "block 1 .* on meta"),
        (lambda: ragged_gram([X, X[:, :2]]), InputValueError, r"block 1: .*\(2, 2, 3\)"),
        (lambda: ragged_gram([X[..., :0]]), InputValueError, r"none of them 0.*\(2, 4, 0\)"),
        (lambda: ragged_gram([X[0]]), InputValueError, r"block 0: .*got \(4, 3\)"),
        (lambda: ragged_gram([X], X[:, 0]), InputTypeError, "share: expected a float64"),
        (lambda: ragged_gram([X], M[..., 0, :]), InputValueError, r"share: .*\(2, 3\), got"),
        (lambda: ragged_output([X], M.float()), InputTypeError, "M: .*float32"),
        (lambda: ragged_output([X], M.mT), InputValueError, r"M: .*\(2, 3, -1\), got \(2, 2, 3\)"),
        (lambda: ragged_output([X], [1.0]), InputTypeError, "M: .*list"),
        (lambda: jacobi([1.0]), InputTypeError, "G: expected a float64"),
        (lambda: jacobi(M), InputValueError, r"jacobi: expected \(members, R, R\)"),
        (lambda: jacobi(torch.eye(65, dtype=F64)[None]), InputValueError, "R ≤ 64.*eigh"),
        (lambda: jacobi(torch.eye(3, dtype=F64)), InputValueError, r"jacobi: G: .*got \(3, 3\)"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_importing_the_library_does_not_import_triton():
    code = f"import sys, hetlora_agg, {PACKAGE}; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Compiling needs no GPU, and finds what the interpreter cannot: layouts triton fails to lower. The
# wrappers run on CPU tensors, and what they would launch is compiled instead.
COMPILE = """
import importlib
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hetlora_agg.linalg.kernels._triton import compiled

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", int: "i32", float: "fp32"}

def compile_instead(kernel, programs, *arguments, **options):
    kernel = compiled(kernel)
    how = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    types = [TYPES[getattr(x, "dtype", type(x))] for x in arguments]
    types += ["constexpr"] * len(options)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), options)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how)
    product = "mma.sync.aligned.m16n8k16.row.col.f64" in binary.asm["ptx"]
    assert product == kernel.__name__.endswith("_tiles"), kernel.__name__

modules = [importlib.import_module("hetlora_agg.linalg.kernels." + name)
    for name in ("ragged_gram", "ragged_output", "jacobi")]
for module in modules:
    module.launch = compile_instead
gram, output, jacobi = modules
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    blocks = [torch.zeros(1, 64, 8, dtype=dtype), torch.zeros(1, 64, 24, dtype=dtype)]
    gram.ragged_gram_triton(blocks)
    output.ragged_output_triton(blocks, torch.zeros(1, 32, 16, dtype=torch.float64))
jacobi.jacobi_triton(torch.zeros(1, 32, 32, dtype=torch.float64))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_device_code_compiles_for_hopper_to_float64_matrix_products(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
