"""A thousand random lives of running aggregates: the bound holds in every one of them."""

import math
import random
from functools import cache

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate
from hetlora_agg.errors import InputValueError, MemoryLimitError
from hetlora_agg.streaming import RunningAggregate

OUT, IN = 10, 8


def client(rng, k, scale):
    """Components of sizes that fall off, as trained ones do."""
    r = rng.choice((1, 2, 3))
    g = np.random.default_rng(rng.getrandbits(32))
    A = g.standard_normal((r, IN)) * scale ** np.arange(r)[:, None]
    return ClientUpdate(
        torch.tensor(A),
        torch.tensor(g.standard_normal((OUT, r))),
        weight=rng.choice((0.5, 1, 7, 1e3)),
        scaling=rng.choice((1, 2, 0.25)),
        id=k,
    )


def exact_mean(clients):
    """Σ n_k s_k B_k A_k / Σ n_k entry by entry, with math.fsum."""
    total = math.fsum(u.weight for u in clients)
    terms = [u.weight * u.scaling * (u.B.numpy() @ u.A.numpy()) for u in clients]
    return np.array(
        [[math.fsum(t[i, j] for t in terms) / total for j in range(IN)] for i in range(OUT)]
    )


@cache
def started(**told):
    """A running aggregate that nobody was added to."""
    return RunningAggregate("flexlora", round=1, stale="skip", rank="full", **told)


def live(seed, **told):
    """One life: clients, duplicates, late ones, forgeries, merges, restarts in any order."""
    rng = random.Random(seed)

    first = started(**told)

    def fresh():
        # The method is asked once for all lives.
        return RunningAggregate._of(first._settings)

    known = [client(rng, k, rng.choice((1.0, 0.3))) for k in range(rng.randint(4, 8))]
    nodes = [fresh() for _ in range(rng.randint(1, 4))]
    for u in known:
        node = rng.choice(nodes)
        chance = rng.random()
        if chance < 0.1:
            assert node.add(u, id=u.id, round=rng.choice((0, 2))) is False
        assert node.add(u, id=u.id, round=1)
        if chance > 0.9:
            assert node.add(u, id=u.id) is False
        if 0.5 < chance < 0.53:
            with pytest.raises(InputValueError, match="other content"):
                node.add((u.A * 2, u.B), id=u.id)
    while len(nodes) > 1:
        rng.shuffle(nodes)
        nodes[0].merge(nodes.pop())
    return known, nodes[0]


@pytest.mark.parametrize("block", range(10))
def test_the_bound_holds(block):
    truncated = 0
    for seed in range(100 * block, 100 * block + 100):
        # Room for 6 or 7 components of 8, and for as many that wait.
        limit = random.Random(seed).choice((None, 2_100, 2_400))
        known, running = live(seed, memory_limit=limit)
        result = running.result()
        mean = exact_mean(known)
        found = result.B.numpy() @ result.A.numpy()
        error = np.linalg.norm(found - mean)
        bound = float(running.bound)
        certified = float(result.certificate.bound)
        assert np.isfinite(found).all()
        assert math.isfinite(bound)
        assert error <= certified, (seed, error, certified)
        assert bound <= certified
        S = sum(
            u.weight * u.scaling * np.linalg.norm(u.B) * np.linalg.norm(u.A) for u in known
        ) / sum(u.weight for u in known)
        if limit is None:
            assert error <= 1e-10 * S
            assert bound <= 1e-10 * S
            assert not result.notes
        else:
            assert running.state_bytes <= limit
            truncated += bound > 1e-10 * S
            assert bound <= S, "a bound of the size of everything says nothing"
            assert ("truncated" in " ".join(result.notes)) == ("up to rank" in repr(running))
    assert truncated >= 30


def test_sums_by_level_are_bounded_too():
    """Parts with denominators of their own: bounds add up with the shares they are divided by."""
    rng = random.Random(1)
    known = [client(rng, k, 0.3) for k in range(120)]
    running = RunningAggregate("rb", levels=[1, 2, 3], rank="full", memory_limit=4_000)
    for u in known:
        running.add(u, id=u.id)
    assert "up to rank" in repr(running)
    mean = np.zeros((OUT, IN))
    for j in range(3):
        owners = [u for u in known if u.A.shape[0] > j]
        N = math.fsum(u.weight for u in owners)
        mean += sum(
            u.weight * u.scaling / N * np.outer(u.B[:, j].numpy(), u.A[j].numpy()) for u in owners
        )
    result = running.result()
    error = np.linalg.norm(result.B.numpy() @ result.A.numpy() - mean)
    assert 1e-6 < error <= float(result.certificate.bound)
    assert error <= float(running.bound)


@pytest.mark.parametrize("name", ["zeropad", "rbla", "fedex", "flora", "hetlora", "ffa"])
def test_bounds_of_exact_sums_are_above_rounding(name):
    """Factors that cancel: what rounding leaves is within the bound all the same."""
    g = np.random.default_rng(0)
    running = RunningAggregate(name)
    A = torch.tensor(g.standard_normal((2, IN)))
    rows = []
    for k in range(200):
        sign = 1 if k % 2 else -1
        B = torch.tensor(g.standard_normal((OUT, 2)) + sign * 1e6)
        own = A if name == "ffa" else torch.tensor(g.standard_normal((2, IN)) + sign * 1e6)
        rows.append((own, B))
        running.add((own, B), id=k)
    weights = [1.0] * 200
    if name == "hetlora":
        weights = [float(np.linalg.norm(B.numpy() @ A.numpy())) for A, B in rows]
    total = math.fsum(weights)

    def mean(i):
        X = [w * row[i].numpy() for w, row in zip(weights, rows, strict=True)]
        flat = [math.fsum(x.flat[j] for x in X) / total for j in range(X[0].size)]
        return np.array(flat).reshape(X[0].shape)

    exact = mean(1) @ mean(0)
    if name in ("fedex", "flora"):
        exact = sum(B.numpy().astype(np.longdouble) @ A.numpy() for A, B in rows) / 200
    whole = running.result().total()
    error = float(np.linalg.norm(whole.B.numpy() @ whole.A.numpy() - exact))
    assert 0 < error <= float(running.bound)


def test_the_bound_of_a_frozen_factor_is_of_its_own_length():
    """Its mean over all clients is shorter, where few of them fill the slot."""
    g = np.random.default_rng(0)
    A = torch.tensor(g.standard_normal((2, IN)) * [[1.0], [1e6]])
    running, sizes = RunningAggregate("ffa"), np.zeros(2)
    for k in range(100):
        r = 2 if k == 50 else 1
        B = torch.tensor(g.standard_normal((OUT, r)))
        running.add((A[:r], B), id=k)
        sizes[:r] += np.linalg.norm(B, axis=0) / 100
    assert float(running.bound) >= 2**-53 * 101 * float(np.linalg.norm(A, axis=1) @ sizes)


def test_a_bound_follows_the_weights():
    """What was lost of light clients is next to nothing once a heavy one has come."""
    rng = random.Random(2)
    running = RunningAggregate("flexlora", memory_limit=2_100)
    for k in range(30):
        running.add(client(rng, k, 1.0), id=k)
    lost = float(running.bound)
    heavy = client(rng, 30, 1.0)
    weight = 2.0**60
    running.add((heavy.A, heavy.B, None, weight), id=30)
    S = float(np.linalg.norm(heavy.B) * np.linalg.norm(heavy.A))
    assert lost > 1e-3
    assert float(running.bound) <= 1e-12 * S
    light = RunningAggregate("flexlora", memory_limit=2_100)
    for k in range(40, 70):
        light.add(client(rng, k, 1.0), id=k)
    running.merge(light)
    assert float(running.bound) <= 1e-12 * S


def fill(name, limit, count=400, size=(OUT, IN), **told):
    """A running aggregate of equal clients of rank 2 that never takes more than its limit."""
    out, columns = size
    update = (torch.ones(2, columns).double(), torch.ones(out, 2).double())
    running = RunningAggregate(name, memory_limit=limit, **told)
    for k in range(count):
        running.add(update, id=k)
        assert running.state_bytes <= limit
    return running


def test_memory_limits():
    number, sums, component = 8, OUT * IN, OUT + IN + 1
    exact = number * (sums + 64 * component)
    assert repr(fill("flexlora", exact)).endswith("summed)")
    assert repr(fill("flexlora", exact - 1)).endswith("summed up to rank 34)")
    # Twice the rank of the largest client, in sums and in clients that wait; two bounds.
    least = number * (2 * 4 * component + 2)
    assert repr(fill("flexlora", least)).endswith("summed up to rank 4)")
    with pytest.raises(
        MemoryLimitError, match=f"rank 4, twice the largest client's, take {least} "
    ):
        fill("flexlora", least - 1)
    with pytest.raises(MemoryLimitError, match="sums of factors have no smaller form"):
        fill("zeropad", number * (2 * (OUT + IN) + 64 * component) - 1)
    fill("zeropad", number * (2 * (OUT + IN) + 64 * component) + 16)
    with pytest.raises(InputValueError, match="memory_limit=: expected an integer of at least 1"):
        RunningAggregate("flexlora", memory_limit=0)


def test_a_refused_client_leaves_those_before_it():
    running = RunningAggregate("flexlora", memory_limit=1_000)
    update = (torch.ones(2, IN).double(), torch.ones(OUT, 2).double())
    for k in range(2):
        running.add(update, id=k)
    for _ in range(2):
        with pytest.raises(MemoryLimitError):
            running.add(update, id=3)
    assert len(running.receipts) == 2
    assert running.result().total().dense().allclose(torch.full((OUT, IN), 2.0).double())


def test_layers_that_come_late_must_fit_too():
    update = (torch.ones(2, IN).double(), torch.ones(OUT, 2).double())
    for limit, what in ((10_500, "sums over 2 layers"), (2_100, "2 layers at rank 6 take more")):
        running = RunningAggregate("flexlora", memory_limit=limit, missing="zero")
        for k in range(99):
            running.add({"q": update}, id=k)
        before = running.result()["q"]
        with pytest.raises(MemoryLimitError, match=what):
            running.add({"q": update, "v": update}, id=99)
        assert torch.equal(running.result()["q"].A, before.A)


def test_the_state_does_not_grow_with_clients():
    sizes = {}
    for name, told in (
        ("flexlora", {}),
        ("rb", {"levels": [1, 2, 3]}),
        ("replicate", {}),
        ("rbla", {}),
    ):
        rng = random.Random(0)
        running = RunningAggregate(name, **told)
        for k in range(300):
            u = client(rng, k, 1.0)
            running.add(u, id=k)
            if k in (99, 199, 299):
                sizes.setdefault(name, []).append(running.state_bytes)
        # But for up to 64 components that wait for their product.
        waiting = 64 * 8 * (OUT + IN + 1)
        assert max(sizes[name]) - min(sizes[name]) <= waiting
