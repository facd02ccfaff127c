"""Values that no argument expects, made anew for every example, and sound calls to spoil."""

import datetime
import math
import types
from collections import OrderedDict, defaultdict
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from hetlora_agg import ClientUpdate, LowRank, aggregate

OUT, IN = 4, 3


def sound(rank=2, seed=0, **fields):
    """A client that nobody objects to."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, IN, generator=g, device="cpu")
    return ClientUpdate(A, torch.randn(OUT, rank, generator=g, device="cpu"), **fields)


def low_rank(rank=2, seed=3):
    """Factors as they are handed around between rounds."""
    u = sound(rank, seed)
    return LowRank(u.A, u.B)


def own_list():
    """A list that contains itself."""
    held = []
    held.append(held)
    return held


def deep(levels=2000):
    """Lists in lists, beyond what recursion can follow."""
    held = []
    for _ in range(levels):
        held = [held]
    return held


def generator():
    """A generator that was used up."""
    used = (x for x in [1])
    list(used)
    return used


NUMBERS = (
    *(0, 1, 2, -1, 3, 7, 10**13, 10**30, 10**400, -(10**400), True, False),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 1e-320, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *(1j, complex(math.nan, 0)),
)
TEXTS = ("", "rb", "full", "a", "h.0.q", "\ud800", "\0", "x" * 5000, "error", "drop", b"rb", b"")
MAKERS = {
    "None": lambda: None,
    "ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "object": object,
    "type": lambda: int,
    "lambda": lambda: lambda c: c,
    "builtin": lambda: len,
    "module": lambda: math,
    "exception": lambda: ValueError("x"),
    "date": lambda: datetime.date(2020, 1, 1),
    "Decimal": lambda: Decimal("0.5"),
    "Decimal NaN": lambda: Decimal("sNaN"),
    "Decimal huge": lambda: Decimal("1e9999"),
    "Fraction": lambda: Fraction(1, 3),
    "path": lambda: Path("/nonexistent/adapter"),
    "namespace": lambda: types.SimpleNamespace(A=1, B=2, shape=(2, 2)),
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": lambda: frozenset({1, "a"}),
    "dict": dict,
    "ordered": lambda: OrderedDict(a=1),
    "default": lambda: defaultdict(list),
    "mapping proxy": lambda: types.MappingProxyType({"q": 1}),
    "dict of none": lambda: {None: None, (1, 2): 3},
    "dict by mixed keys": lambda: {1: 2, "a": 3, None: 4},
    "own list": own_list,
    "deep list": deep,
    "used generator": generator,
    "endless text": lambda: iter("ab"),
    "range": lambda: range(3),
    "slice": lambda: slice(None),
    "memory": lambda: memoryview(b"abc"),
    "bytearray": lambda: bytearray(4),
    "np int": lambda: np.int64(2),
    "np float": lambda: np.float32(0.5),
    "np NaN": lambda: np.float64("nan"),
    "np bool": lambda: np.True_,
    "np str": lambda: np.str_("rb"),
    "np datetime": lambda: np.datetime64("2020-01-01"),
    "np void": lambda: np.zeros(1, dtype=[("a", "f4")])[0],
    "np dtype": lambda: np.dtype("f4"),
    "array": lambda: np.ones((2, IN), np.float32),
    "array 0-d": lambda: np.array(2.0),
    "array empty": lambda: np.zeros((0, IN)),
    "array int": lambda: np.ones((2, IN), int),
    "array object": lambda: np.array([[1, None], ["a", 2.0]], dtype=object),
    "array text": lambda: np.array([["a", "b"]]),
    "array dates": lambda: np.zeros((2, IN), "datetime64[s]"),
    "array records": lambda: np.zeros((2, IN), dtype=[("a", "f4"), ("b", "i1")]),
    "array masked": lambda: np.ma.masked_array(np.ones((2, IN)), mask=np.eye(2, IN)),
    "array read-only": lambda: np.broadcast_to(np.float32(1), (2, IN)),
    "array big-endian": lambda: np.ones((2, IN), ">f4"),
    "array complex": lambda: np.ones((2, IN), complex),
    "array long double": lambda: np.ones((2, IN), np.longdouble),
    "tensor": lambda: torch.ones(2, IN),
    "tensor B": lambda: torch.ones(OUT, 2),
    "tensor 0-d": lambda: torch.tensor(2.0),
    "tensor integer": lambda: torch.tensor(2),
    "tensor bool": lambda: torch.tensor(True),
    "tensor empty": lambda: torch.ones(0, IN),
    "tensor 1-d": lambda: torch.ones(3),
    "tensor 5-d": lambda: torch.ones(1, 1, 1, 2, IN),
    "tensor int": lambda: torch.ones(2, IN, dtype=torch.int32),
    "tensor uint16": lambda: torch.ones(2, IN).to(torch.uint16),
    "tensor complex": lambda: torch.ones(2, IN) * 1j,
    "tensor conjugate": lambda: (torch.ones(2, IN) * 1j).conj(),
    "tensor negative view": lambda: (torch.ones(2, IN) * 1j).conj().imag,
    "tensor float8": lambda: torch.ones(2, IN).to(torch.float8_e4m3fn),
    "tensor float64": lambda: torch.ones(2, IN, dtype=torch.float64),
    "tensor float16": lambda: torch.full((2, IN), 6e4, dtype=torch.float16),
    "tensor NaN": lambda: torch.full((2, IN), math.nan),
    "tensor Inf": lambda: torch.full((2, IN), -math.inf),
    "tensor huge": lambda: torch.full((2, IN), 3e38),
    "tensor denormal": lambda: torch.full((2, IN), 1e-45),
    "tensor transposed": lambda: torch.ones(IN, 2),
    "tensor meta": lambda: torch.ones(2, IN, device="meta"),
    "tensor sparse": lambda: torch.eye(2, IN).to_sparse(),
    "tensor expanded": lambda: torch.ones(1).expand(2, IN),
    "tensor grown": lambda: torch.ones(2, IN, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.ones(2, IN)),
    "module of torch": lambda: torch.nn.Linear(2, 2),
    "generator of torch": lambda: torch.Generator().manual_seed(1),
    "generator of numpy": lambda: np.random.default_rng(0),
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([2, 3]),
    "update": sound,
    "pair": lambda: (torch.ones(2, IN), torch.ones(OUT, 2)),
    "updates": lambda: [sound(), sound(3, 1)],
    "layers": lambda: {"q": [sound()]},
    "low rank": low_rank,
    "low rank of integers": lambda: LowRank(torch.ones(2, IN).int(), torch.ones(OUT, 2).int()),
    "low rank on meta": lambda: LowRank(
        torch.ones(2, IN, device="meta"), torch.ones(OUT, 2, device="meta")
    ),
    "low rank of arrays": lambda: low_rank().numpy(),
    "low rank of two kinds": lambda: LowRank(np.ones((2, IN), np.float32), torch.ones(OUT, 2)),
    "low rank of objects": lambda: LowRank(
        np.ones((2, IN), dtype=object), np.ones((OUT, 2), dtype=object)
    ),
    "low rank of two dtypes": lambda: LowRank(
        torch.ones(2, IN, dtype=torch.float64), torch.ones(OUT, 2, dtype=torch.float16)
    ),
    "low rank with NaN": lambda: LowRank(torch.full((2, IN), math.nan), torch.ones(OUT, 2)),
    "low rank of rank 0": lambda: LowRank(torch.ones(0, IN), torch.ones(OUT, 0)),
    "result": lambda: aggregate([sound(), sound(3, 1)]),
    "result that is stacked": lambda: aggregate([sound(), sound(3, 1)], "flora"),
    "result of layers": lambda: {"q": aggregate([sound()])},
    "result of arrays": lambda: aggregate([(np.ones((2, IN)), np.ones((OUT, 2)))]),
}
MAKERS |= {f"number {n!r:.20}": (lambda n=n: n) for n in NUMBERS}
MAKERS |= {f"text {t!r:.20}": (lambda t=t: t) for t in TEXTS}

leaves = st.sampled_from(sorted(MAKERS)).map(lambda name: MAKERS[name]())
"""One value, and its name where an example is printed."""

values = st.one_of(
    leaves,
    st.lists(leaves, max_size=4),
    st.lists(leaves, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(["q", "v", "phone", 0, 1, None]), leaves, max_size=3),
    st.floats(),
    st.integers(),
    st.text(max_size=5),
)
"""Any value, also in a list, a tuple or a mapping."""

FIELDS = ("A", "B", "rank", "weight", "scaling", "slots", "id")


@st.composite
def spoiled_updates(draw):
    """Sound clients, one or two of whose fields, or one of whom, are replaced."""
    updates = [sound(rank, seed) for seed, rank in enumerate(draw(st.lists(st.integers(1, 3),
               min_size=1, max_size=3)))]  # fmt: skip
    for _ in range(draw(st.integers(1, 2))):
        k = draw(st.integers(0, len(updates) - 1))
        if isinstance(updates[k], ClientUpdate) and draw(st.integers(0, 5)):
            updates[k] = replace(updates[k], **{draw(st.sampled_from(FIELDS)): draw(values)})
        else:
            updates[k] = draw(values)
    return updates
