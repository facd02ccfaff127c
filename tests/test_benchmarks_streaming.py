"""The streaming and distributed benchmarks measure what they say, and what is derived is right."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import (
    bench_distributed,
    bench_streaming,
    plots_streaming,
    streaming_costs,
    streaming_process,
)
from benchmarks import streaming_million as million
from benchmarks.bench_distributed import summary
from benchmarks.distributed_process import Clock, jobs, of_clients, of_layers
from benchmarks.report import load
from benchmarks.report_streaming import TABLES
from benchmarks.streaming_clients import LLAMA, MINILM, Model, Stream, Watched, client, distance
from benchmarks.streaming_process import every, forget_peak, resident, seconds
from hetlora_agg import LowRank

LARGE = "one layer of Llama-8B"

SMALL = Model("small", ((40, 30), (24, 30)), 40, (2, 4, 8))

STREAMS = bench_streaming.STREAMS["MiniLM"]


def dense(model):
    """Weighted mean of the products by layer, and Σ p ‖B‖ ‖A‖ of 24 rows and columns: NumPy's."""
    every = [client(model, k) for k in range(model.clients)]
    weights = np.array([1 + k % 97 for k in range(model.clients)], dtype=float)
    weights /= weights.sum()
    means, scale = {}, 0.0
    for name in every[0]:
        pairs = [(c[name].B.double().numpy(), c[name].A.double().numpy()) for c in every]
        means[name] = sum(w * (B @ A) for w, (B, A) in zip(weights, pairs, strict=True))
        norms = [np.linalg.norm(B[:24]) * np.linalg.norm(A[:, :24]) for B, A in pairs]
        scale += float(weights @ np.array(norms))
    return means, scale


def as_result(matrix):
    return LowRank(torch.from_numpy(matrix), torch.eye(len(matrix), dtype=torch.float64))


def test_clients_are_the_same_whenever_they_are_asked_for():
    first, again = client(SMALL, 7), client(SMALL, 7)
    for name, u in first.items():
        assert torch.equal(u.A, again[name].A)
        assert torch.equal(u.B, again[name].B)
        assert not torch.equal(u.A, client(SMALL, 10)[name].A)
    ranks = [client(SMALL, k)["layers.0"].A.shape[0] for k in range(4)]
    assert ranks == [2, 4, 8, 2]
    rostered = Stream("rb", "roster").settings(SMALL)["roster"]
    assert rostered[:2] == [(0, 2, 1), (1, 4, 2)]
    assert len(rostered) == SMALL.clients


def test_models_are_what_they_are_called():
    assert (MINILM.clients, MINILM.sizes) == (10_000, ((384, 384),) * 12)
    assert (min(MINILM.ranks), max(MINILM.ranks), MINILM.rank) == (4, 64, 34)
    assert LLAMA.sizes == ((4096, 4096), (1024, 4096))
    assert LLAMA.clients == 10_000
    assert SMALL.flops == pytest.approx(2 * 14 / 3 * (40 * 30 + 24 * 30))
    assert SMALL.numbers == pytest.approx(14 / 3 * (70 + 54))
    assert SMALL.dense_bytes == 8 * (40 * 30 + 24 * 30)


def test_watched_sums_see_an_exact_result_and_a_planted_error():
    means, scale = dense(SMALL)
    watched = Watched(SMALL, "products")
    for k in range(SMALL.clients):
        watched.add(client(SMALL, k))
    exact = {name: as_result(mean) for name, mean in means.items()}
    assert watched.error(exact) < 1e-16
    stray = dict(means)
    stray["layers.1"] = stray["layers.1"].copy()
    stray["layers.1"][3, 5] += 1e-9
    wrong = {name: as_result(mean) for name, mean in stray.items()}
    assert watched.error(wrong) == pytest.approx(1e-9 / scale, rel=1e-6)


def test_watched_factors_are_those_of_rbla():
    found = bench_streaming.streamed(replace(SMALL, clients=210), Stream("rbla", watched="factors"))
    assert found["error"]["watched"] < 1e-16
    # The same sums against another method's result.
    other = bench_streaming.streamed(
        replace(SMALL, clients=210), Stream("zeropad", watched="factors")
    )
    assert other["error"]["watched"] > 1e-3


def test_a_distance_is_relative_to_the_second():
    one, other = {"a": as_result(np.diag([3.0, 4.0]))}, {"a": as_result(np.diag([3.0, 1.0]))}
    assert distance(one, other) == pytest.approx(3 / math.sqrt(10))


def test_a_stream_is_timed_at_its_marks():
    model = replace(SMALL, clients=210)
    found = bench_streaming.streamed(model, Stream("flora", watched="products"))
    assert [p["clients"] for p in found["points"]] == [10, 20, 50, 100, 200, 210]
    for key in ("seconds", "peak"):
        values = [p[key] for p in found["points"]]
        assert values == sorted(values)
        assert values[0] > 0
    # Sums, and at most the components that wait for their product.
    waiting = 8 * (64 + 8) * sum(out + columns + 1 for out, columns in model.sizes)
    assert model.dense_bytes < found["points"][-1]["state"] < model.dense_bytes + waiting
    assert found["error"]["watched"] < 1e-16 < found["error"]["bound"] < 1e-10
    assert found["checkpoint"]["clients"] == 210
    assert found["checkpoint"]["bytes"] > model.dense_bytes
    assert set(found["growth"]) == {"peak", "above"}
    assert found["growth"]["peak"] < 1.2


@pytest.mark.parametrize("stream", STREAMS, ids=lambda s: s.label)
def test_streamed_is_the_result_of_one_call(stream):
    model = replace(MINILM, sizes=((48, 48),) * 2, clients=60, ranks=(4, 8, 12))
    found = bench_streaming.one_shot(model, stream)
    assert found["how"] == "summed"
    assert 0 < found["error"] < 1e-12


def test_a_truncated_state_errs_less_than_its_bound():
    model = replace(SMALL, sizes=((96, 96),), clients=40)
    narrow, wide = (bench_streaming.truncated(model, times) for times in (2, 4))
    assert (narrow["rank"], wide["rank"]) == (16, 32)
    for found in (narrow, wide):
        assert 0.01 < found["error"] < found["bound"]
        assert found["state"]["truncated"] < found["state"]["exact"]
    assert wide["error"] < narrow["error"]


def test_layers_cost_what_they_take():
    two = bench_streaming.by_layers(replace(SMALL, clients=60), 2)
    assert two["how"] == "summed"
    assert 2 * SMALL.dense_bytes <= two["state"] < two["checkpoint"]["bytes"]


def test_steps_are_measured():
    rates = streaming_costs.products(replace(SMALL, sizes=((64, 64),) * 3 + ((8, 64),)))
    assert rates["shape"] == [3, 64, 64, 64]
    flops = 2 * 3 * 64 * 64 * 64
    assert rates["gflops"]["added"] == pytest.approx(
        flops / rates["seconds"]["added"]["fastest"] / 1e9
    )
    assert rates["rate"]["machine"] == pytest.approx(
        rates["gflops"]["added"] / rates["gflops"]["machine"]
    )
    product = streaming_costs.matrix_product(128)
    assert product["gflops"] == pytest.approx(2 * 128**3 / product["fastest"] / 1e9)
    assert streaming_costs.decomposition(64)["seconds"] > 0
    receipts = streaming_costs.receipts(replace(SMALL, clients=300))
    # An id, a digest of 64 digits, a weight, and what JSON puts around them.
    assert 64 + 14 < receipts["file"] < 200


def test_seconds_are_those_of_the_processor():
    slept, _ = seconds(lambda: time.sleep(0.2))
    assert 0 <= slept < 0.1


def test_the_high_water_mark_begins_anew():
    kept = torch.ones(5_000_000)
    resting = forget_peak()
    del kept
    more = torch.ones(10_000_000)
    assert 15e6 < resident() - resting < 45e6
    del more


def test_parts_are_kept(tmp_path, monkeypatch, capsys):
    so_far = tmp_path / "so_far.json"
    so_far.write_text(json.dumps({"first": {"x": 1}}))
    monkeypatch.setattr(streaming_process, "apart", lambda run, *arguments: run(*arguments))
    found = every({"first": (dict, [("x", 3)]), "second": (dict, [(1, 2)])}, so_far)
    # What is there is not run again, and what is new is as it comes back from the file.
    assert found == {"first": {"x": 1}, "second": {"1": 2}} == json.loads(so_far.read_text())


def test_a_part_that_fails_says_why():
    class Pipe:
        def send(self, message):
            self.message = message

    pipe = Pipe()
    streaming_process._child(pipe, int, ("7",))
    assert pipe.message == ("done", 7)
    streaming_process._child(pipe, int, ("no number",))
    what, why = pipe.message
    assert what == "failed"
    assert "ValueError" in why


@pytest.mark.parametrize("quick", [False, True])
def test_everything_is_a_part_of_the_results(quick):
    parts = bench_streaming.parts(quick)
    found = {
        name: {"size": n + 1, "layers": n + 1, "seconds": 2.0**n} for n, name in enumerate(parts)
    }
    results = bench_streaming.assembled(found, quick)
    shown = sum(len(results[key]) for key in ("clients", "one_shot", "layers", "truncated"))
    shown += len(results["products"]) + len(results["decomposition"]) + 2
    assert shown == len(parts)
    if not quick:
        assert all(model["clients"] == 10_000 for model in results["models"].values())
        assert parts["layers: 32"][2] == 32


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_takes_everything(alone):
    clock = Clock()
    model = replace(SMALL, clients=60)
    row, (reduced, merged) = of_clients(model, "flora", clock)
    means, scale = dense(model)
    for found in (reduced, merged):
        assert found.keys() == means.keys()
        for name, mean in means.items():
            product = found[name].B.double().numpy() @ found[name].A.double().numpy()
            assert np.linalg.norm(product - mean) < 1e-6 * scale
    assert row["clients"] == 60
    assert {name: len(turns) for name, turns in clock.found.items()} == {
        "result": 3,
        "merge": 3,
        "result of the merged": 1,
    }
    row, (found,) = of_layers(SMALL, "flexlora", Clock())
    assert row["layers"] == 2
    for name, mean in dense(SMALL)[0].items():
        product = found[name].B.double().numpy() @ found[name].A.double().numpy()
        best = np.linalg.svd(mean, compute_uv=False)[8:]
        assert np.linalg.norm(product - mean) == pytest.approx(np.linalg.norm(best), rel=1e-4)


def test_processes_are_summed_up_by_the_slowest():
    def one(wall, processor, sent):
        steps = [{"wall": w, "processor": w / 2, "bytes": sent} for w in wall]
        return {"add": {"wall": 9.0, "processor": processor}, "steps": {"result": steps}}

    found = summary([one([3.0, 5.0], 4.0, 70), one([4.0, 2.0], 6.0, 70)])
    assert found["steps"]["result"] == {"wall": 4.0, "processor": 1.5, "bytes": 70}
    assert (found["wall"], found["processor"], found["total"]) == (9.0, 6.0, 10.0)


def test_jobs_share_out_clients_and_layers():
    assert bench_distributed.PROCESSES == (1, 2, 4)
    shared = [what for what, _, _ in jobs(False).values()]
    assert shared.count("clients") == 3
    assert shared.count("layers") == 2
    assert {len(model.sizes) for what, model, _ in jobs(False).values() if what == "layers"} == {32}


@pytest.fixture
def rates():
    """Round numbers in place of what was measured."""
    return million.Measured(
        adding=1e9, factors=1e6, result=1e-10, room=2.0, saving=1e-9, loading=5e-10,
        receipt=300.0, receipt_file=100.0, passing=5e3,
        asking=4e-5, merging=3e-9, reducing=4e-9,
    )  # fmt: skip


def test_a_million_clients_by_hand(rates):
    model = million.LARGE["q and v"]
    assert model.dense_bytes == 80 * 8 * (8192 * 8192 + 1024 * 8192)
    need = million.needs(model, rates, "products")
    entries = 80 * 34 * (8192 + 8192 + 1024 + 8192)
    assert need["bytes"] == pytest.approx(1e6 * 2 * entries)
    # 10 Gbit/s are 1.25 GB/s; an hour has 3,600 s.
    assert need["network"] == pytest.approx(2e6 * entries / 1.25e9 / 3600)
    assert need["adding"] == pytest.approx(1e6 * 80 * 2 * 34 * (8192 * 8192 + 1024 * 8192) / 1e9)
    assert need["result"] == pytest.approx(1e-10 * 80 * (8192**3 + 1024**2 * 8192))
    assert need["cores"] == pytest.approx((need["adding"] + need["result"]) / 3600 / 32)
    assert need["memory"] == pytest.approx(2 * model.dense_bytes / 256e9)
    assert million.machines(need) == math.ceil(need["adding"] / 3600 / 32 + need["result"] / 115200)
    need = million.needs(model, rates, "factors")
    assert need["adding"] == pytest.approx(1e6 * entries / 1e6)
    assert need["result"] == 0
    assert need["memory"] == pytest.approx(2 * 8 * 64 * entries / 34 / 256e9)
    assert need["bytes"] == pytest.approx(1e6 * 2 * entries)
    every = million.LARGE["all linear layers"]
    per_layer = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    assert every.dense_bytes == 80 * 8 * per_layer


def cells(table):
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table.split("\n")[2:]
    ]


def test_merging_and_saving_by_hand(rates, monkeypatch):
    monkeypatch.setattr(million.Measured, "read", classmethod(lambda cls: rates))
    dense = 80 * 8 * (8192 * 8192 + 1024 * 8192)
    # Receipts of 100 bytes go along.
    state = dense + 1e8
    servers, clients, hops, size, *spent = cells(million.million_tree())[1]
    assert (servers, clients, hops, size) == ("16", "62,500", "5", f"{state / 1e9:.0f} GB")
    once = state * 15 / 16
    wanted = 5 * state / 1.25e9, 5 * state * 3e-9, once / 1.25e9, once * 4e-9
    assert spent == [f"{seconds / 60:.1f} min" for seconds in wanted]
    shared, whole, _, large = cells(million.million_failures())
    count = million.machines(million.needs(million.LARGE["q and v"], rates, "products"))
    own = dense / count + 1e8
    between = 1000 * 3600 / count
    assert shared[1:4] == [f"{count:,}", f"{own / 1e9:.1f} GB", f"{1e-9 * own:.0f} s"]
    assert whole[4] == f"{math.sqrt(2 * 1e-9 * state * between) / 60:.0f} min"
    assert whole[5] == f"{100 * math.sqrt(1e-9 * state / 2 / between):.1f} %"
    assert whole[7] == f"{3600 / between:.2f}"
    assert large[3] == "does not fit"


def test_rates_are_read_off_the_results():
    m, found = million.Measured.read(), load("streaming")["results"]
    row = next(r for r in found["clients"] if (r["model"], r["method"]) == (LARGE, "flora"))
    last = row["points"][-1]
    flops = 2 * 34 * (4096 * 4096 + 1024 * 4096) * last["clients"]
    assert m.adding == pytest.approx(flops / last["seconds"])
    row = next(r for r in found["clients"] if (r["model"], r["method"]) == (LARGE, "rbla"))
    last = row["points"][-1]
    entries = 34 * (2 * 4096 + 1024 + 4096) * last["clients"]
    assert m.factors == pytest.approx(entries / last["seconds"])
    assert m.result == pytest.approx(found["decomposition"][-1]["seconds"] / 4096**3)
    layers = next(r for r in found["layers"] if r["layers"] == 32)
    assert m.room == pytest.approx((layers["peak"] - layers["resting"]) / layers["state"])
    assert m.saving * layers["checkpoint"]["bytes"] == pytest.approx(
        layers["checkpoint"]["save"]["wall"]
    )
    job = next(j for j in load("distributed")["results"]["jobs"] if "4096" in j["model"])
    four = job["runs"][-1]
    assert four["processes"] == 4
    # Two hops up the tree, one back.
    state = four["each"][0]["state"]
    assert m.merging * 3 * state == pytest.approx(four["summary"]["steps"]["merge"]["wall"])
    assert m.reducing * state == pytest.approx(four["summary"]["steps"]["result"]["wall"])


def test_tables_are_of_the_committed_results():
    results = load("streaming")["results"]
    text = TABLES["streaming_clients"]()
    for row in results["clients"]:
        assert f"| `{row['method']}` | " in text
        assert f"{row['growth']['peak']:.2f}×" in text
    assert ", met." in TABLES["streaming_errors"]()
    for table in (*TABLES.values(), *million.TABLES.values()):
        assert "nan" not in table()


def test_a_whole_large_model_took_ten_thousand_clients():
    results = load("llama")["results"]
    model = results["model"]
    assert (model["clients"], len(model["sizes"])) == (10_000, 64)
    assert {min(model["ranks"]), max(model["ranks"])} == {4, 64}
    for row in results["clients"]:
        assert row["points"][-1]["clients"] == 10_000
        assert row["error"]["watched"] <= row["error"]["bound"]
        peaks = {point["clients"]: point["peak"] for point in row["points"]}
        assert peaks[10_000] <= 1.2 * peaks[500]
        assert f"`{row['method']}`" in TABLES["streaming_llama"]()


def test_results_keep_their_targets_or_the_page_says_so():
    results = load("streaming")["results"]
    most = results["targets"]
    missed = [row for row in results["clients"] if row["growth"]["peak"] > most["growth"]]
    assert ("**missed** by" in TABLES["streaming_clients"]()) == bool(missed)
    watched = [row["error"]["watched"] for row in results["clients"] if row["error"]]
    assert max(watched + [row["error"] for row in results["one_shot"]]) <= most["error"]
    assert len(results["products"]) == 4
    assert min(row["rate"]["machine"] for row in results["products"].values()) >= most["rate"]
    for row in results["truncated"]:
        assert row["error"] <= row["bound"]
    for row in load("distributed")["results"]["jobs"]:
        assert max(run["distance"] for run in row["runs"]) < 1e-6


def test_pictures_have_the_fitted_exponents():
    results = load("streaming")["results"]
    figure = plots_streaming.draw_streaming(results)
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    for row in results["clients"]:
        exponent = f"{row['model']}, {row['method']}: exponent {row['fit']['exponent']:.2f}"
        assert exponent in labels
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    figure = plots_streaming.draw_distributed(load("distributed")["results"]["jobs"])
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
