"""The aggregator with hand-made models, and the example in NVFlare's own simulator."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare.app_common.aggregators.model_aggregator")

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.base_model_controller import BaseModelController

from hetlora_agg import InputTypeError, InputValueError
from hetlora_agg.integrations.nvflare import DIVIDE, HetLoRAAggregator, own_params
from integrations.fleet import (
    ALPHA,
    HEAD,
    KEYS,
    RANKS,
    WEIGHTS,
    as_numpy,
    assert_global,
    assert_own,
    expected,
    factors,
    mean_head,
    trained,
)

# NVFlare's dependencies warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("default")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "nvflare"
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "nvflare.md"


def update(node, params=None, metrics=None, params_type="FULL", **meta):
    # Names sort as the numbers do.
    meta = {"client_name": f"site-{node:02}", "NUM_STEPS_CURRENT_ROUND": WEIGHTS[node], **meta}
    meta = {key: value for key, value in meta.items() if value is not None}
    params = trained(node) if params is None else params
    return FLModel(params=params, params_type=params_type, metrics=metrics, meta=meta)


def played(aggregator, updates):
    """One round as the controller plays it."""
    aggregator.reset_stats()
    for model in updates:
        aggregator.accept_model(model)
    return aggregator.aggregate_model()


@pytest.fixture
def sent():
    return {node: trained(node) for node in RANKS}


@pytest.fixture
def aggregator():
    return HetLoRAAggregator("rb", lora_alpha=ALPHA)


def test_the_global_adapter_is_the_librarys(aggregator, sent):
    whole = played(aggregator, [update(n, metrics={"loss": float(n), "text": "x"}) for n in RANKS])
    assert list(whole.params) == [*KEYS, HEAD]
    assert_global(whole.params, expected(sent))
    np.testing.assert_allclose(whole.params[HEAD], mean_head(sent), rtol=1e-6)
    total = sum(WEIGHTS.values())
    assert whole.metrics == {"loss": pytest.approx(sum(WEIGHTS[n] * n for n in RANKS) / total)}
    assert (whole.params_type, whole.meta[DIVIDE]) == ("FULL", "AB")


def test_the_order_of_updates_changes_no_bit():
    one, other = (
        played(HetLoRAAggregator("rb", lora_alpha=ALPHA), [update(n) for n in order]).params
        for order in (list(RANKS), list(reversed(RANKS)))
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_numpy_arrays_of_the_numpy_exchange_are_taken_and_given(aggregator, sent):
    whole = played(aggregator, [update(n, as_numpy(sent[n])) for n in sent])
    assert all(isinstance(X, np.ndarray) for X in whole.params.values())
    assert_global(whole.params, expected(sent))


def test_bfloat16_travels_as_tensors(aggregator):
    whole = played(aggregator, [update(n, trained(n, dtype=torch.bfloat16)) for n in RANKS])
    assert {X.dtype for X in whole.params.values()} == {torch.bfloat16}
    own = own_params(whole, trained(3), lora_alpha=ALPHA)
    assert {X.dtype for X in own.values()} == {torch.float32}


@pytest.mark.parametrize("node", RANKS)
def test_clients_take_their_leading_ranks_back(aggregator, sent, node):
    whole = played(aggregator, [update(n) for n in RANKS])
    whole.params["frozen.weight"] = torch.ones(3)
    own = own_params(whole, trained(node), lora_alpha=ALPHA)
    assert list(own) == list(trained(node))
    assert_own(own, expected(sent), RANKS[node])


def test_clients_of_methods_with_a_common_factor_take_it_undivided():
    aggregator = HetLoRAAggregator("ffa", lora_alpha=ALPHA)
    A = {key: X for key, X in trained(11).items() if "_A" in key}

    def sends(node, arrays):
        cut = {key: X[: RANKS[node]] for key, X in arrays.items() if "_A" in key}
        return update(node, {**trained(node), **cut})

    whole = played(aggregator, [sends(node, A) for node in RANKS])
    assert whole.meta[DIVIDE] == "B"
    own = own_params(whole, trained(3), lora_alpha=ALPHA)
    assert all(torch.equal(own[key], A[key][:2]) for key in A)
    played(aggregator, [sends(node, whole.params) for node in RANKS])


def test_absent_clients_and_state(sent):
    aggregator = HetLoRAAggregator("rb", lora_alpha=ALPHA)
    whole = played(aggregator, [update(n) for n in RANKS])
    later = {node: trained(node, round=2) for node in (3, 7)}
    after = played(aggregator, [update(n, later[n]) for n in later])
    assert_global(after.params, expected(later, previous=factors(whole.params)))
    assert [X.shape for X in after.params.values()] == [X.shape for X in whole.params.values()]


def test_the_servers_model_keeps_its_rank():
    aggregator = HetLoRAAggregator("flexlora", lora_alpha=ALPHA, global_rank=6)
    whole = played(aggregator, [update(3), update(7)])
    assert len(whole.params[KEYS[0]]) == 6
    assert_global(whole.params, expected({n: trained(n) for n in (3, 7)}, "flexlora"))


@pytest.mark.parametrize("said", [{"lora_alpha": 4}, {"scaling": 0.5}])
def test_scalings_come_from_the_clients_meta(said, sent):
    whole = played(HetLoRAAggregator("rb"), [update(n, **said) for n in RANKS])
    scaling = (lambda rank: 4 / rank) if "lora_alpha" in said else (lambda rank: 0.5)
    assert_global(whole.params, expected(sent, scaling=scaling))


def test_without_weights_all_count_alike_and_some_without_is_an_error(aggregator, sent):
    whole = played(aggregator, [update(n, NUM_STEPS_CURRENT_ROUND=None) for n in RANKS])
    mean = sum(sent[n][HEAD] for n in sent) / len(sent)
    np.testing.assert_allclose(whole.params[HEAD], mean, rtol=1e-5, atol=1e-6)
    some = [update(3), update(7, NUM_STEPS_CURRENT_ROUND=None)]
    with pytest.raises(InputValueError, match=r"site-07.*NUM_STEPS_CURRENT_ROUND"):
        played(aggregator, some)
    own = HetLoRAAggregator("rb", lora_alpha=ALPHA, weight_key="examples")
    renamed = [update(n, NUM_STEPS_CURRENT_ROUND=None, examples=WEIGHTS[n]) for n in RANKS]
    assert_global(played(own, renamed).params, expected(sent))


def test_zero_updates_are_an_error_that_explains(aggregator):
    with pytest.raises(InputValueError, match=r"no client's update arrived.*send tensors"):
        played(aggregator, [])


def test_what_is_wrong_with_an_update_is_said_when_the_round_ends(aggregator):
    # The controller swallows what accept_model raises; the round must not go on without a client.
    assert "except Exception" in inspect.getsource(BaseModelController._process_result)
    diff = update(7, params_type="DIFF")
    for wrong, match in (
        (diff, "site-07.*DIFF"),
        (update(7, {HEAD: torch.ones(3, 4)}), "site-07.*4 keys differ"),
    ):
        with pytest.raises(InputValueError, match=match):
            played(aggregator, [update(3), wrong])
    with pytest.raises(InputValueError, match=r"site-03.*scaling or lora_alpha"):
        played(HetLoRAAggregator("rb"), [update(3)])


def test_what_a_job_cannot_carry_is_refused():
    with pytest.raises(InputTypeError, match="JSON"):
        HetLoRAAggregator(lambda c: c, lora_alpha=1)
    with pytest.raises(InputTypeError, match="JSON"):
        HetLoRAAggregator("rb", scaling=lambda rank: 1.0)
    with pytest.raises(InputValueError, match="flora"):
        HetLoRAAggregator("flora", lora_alpha=1)
    with pytest.raises(InputTypeError, match="rang"):
        HetLoRAAggregator("rb", lora_alpha=1, options={"rang": 2})


def test_every_argument_survives_the_job(tmp_path):
    from nvflare.job_config.fed_job_config import FedJobConfig

    given = {
        "method": "flexlora",
        "lora_alpha": 16,
        "global_rank": 8,
        "options": {"rank": 8},
        "weight_key": "examples",
        "seed": 3,
    }
    job = FedJobConfig("job", min_clients=1)
    assert job._get_args(HetLoRAAggregator(**given), str(tmp_path)) == given
    found = job._get_args(HetLoRAAggregator("rb", scaling=2.0), str(tmp_path))
    assert found == {"scaling": 2.0}


def test_own_params_refuses_other_models(aggregator):
    whole = played(aggregator, [update(n) for n in RANKS])
    with pytest.raises(InputValueError, match="lacks 1 keys of like=, such as 'more'"):
        own_params(whole, {**trained(3), "more": torch.ones(1)}, lora_alpha=ALPHA)


def test_the_example_runs_in_nvflares_simulator(tmp_path):
    pytest.importorskip("sklearn")
    ran = subprocess.run(
        [sys.executable, "job.py", str(tmp_path)],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    _, before, _, after, *_ = ran.stdout.splitlines()[-1].split()
    assert float(before) < 0.3
    assert float(after) > 0.6


def test_at_most_five_lines_of_the_example_concern_the_library():
    concerned = [
        line
        for file in EXAMPLE.glob("*.py")
        for line in file.read_text().split('"""', 2)[2].splitlines()
        if any(name in line for name in ("hetlora_agg", "HetLoRAAggregator(", "own_params("))
    ]
    assert len(concerned) <= 5


def test_the_pages_code_runs_as_pasted():
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), namespace)
