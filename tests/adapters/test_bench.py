"""The benchmark of disk to disk measures what it says."""

from benchmarks import bench_adapters
from hetlora_agg import METHODS


def test_the_trial_runs(capsys):
    rows = bench_adapters.measure(bench_adapters.TRIAL, ("rb", "flora"))
    assert set(bench_adapters.METHODS) <= set(METHODS)
    assert rows["layers"] == 4
    # bf16, (out + in) · rank entries per module, and headers
    factors = 2 * 2 * sum(bench_adapters.TRIAL.ranks) * (64 + 48 + 16 + 48)
    assert factors < rows["input_bytes"] < factors + 3 * 4096
    for row in rows["methods"].values():
        assert row["peak_bytes"] > row["imported_bytes"] > 0
        assert row["met"]
    assert rows["methods"]["flora"]["write_clients_seconds"] is None
    assert rows["methods"]["rb"]["output_bytes"] > rows["methods"]["flora"]["output_bytes"]
