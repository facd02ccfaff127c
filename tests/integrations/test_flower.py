"""The strategy with hand-made messages, and the example in Flower's own simulation."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr.serverapp.strategy")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from hetlora_agg import InputTypeError, InputValueError
from hetlora_agg.integrations.flower import DIVIDE, HetLoRA, receive, reply
from integrations.fleet import (
    ALPHA,
    HEAD,
    KEYS,
    RANKS,
    WEIGHTS,
    assert_global,
    assert_own,
    expected,
    factors,
    mean_head,
    trained,
)

# Flower's dependencies warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("default")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "flower" / "digits.py"
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "flower.md"


@pytest.fixture(autouse=True)
def running(monkeypatch):
    """Messages can be made inside a run only."""
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


class Grid:
    """Nodes that are always there."""

    def __init__(self, nodes=RANKS):
        self.nodes = list(nodes)

    def get_node_ids(self):
        return self.nodes


def instruction(node, content=None):
    content = RecordDict() if content is None else content
    return Message(content, dst_node_id=node, message_type="train")


def answer(node, arrays=None, **said):
    arrays = trained(node) if arrays is None else arrays
    return Message(reply(arrays, WEIGHTS[node], **said), reply_to=instruction(node))


def by_node(messages):
    return {message.metadata.dst_node_id: message for message in messages}


def arrays_of(message):
    (record,) = message.content.array_records.values()
    return record.to_torch_state_dict()


@pytest.fixture
def sent():
    return {node: trained(node) for node in RANKS}


@pytest.fixture
def strategy():
    return HetLoRA("rb", lora_alpha=ALPHA)


def test_flowers_own_strategy_cannot():
    from flwr.serverapp.strategy import FedAvg

    with pytest.raises(ValueError, match="broadcast"):
        FedAvg().aggregate_train(1, [answer(node) for node in RANKS])


def test_the_global_adapter_is_the_librarys(strategy, sent):
    record, metrics = strategy.aggregate_train(1, [answer(n, loss=float(n)) for n in RANKS])
    arrays = record.to_torch_state_dict()
    assert list(arrays) == [*KEYS, HEAD]
    assert_global(arrays, expected(sent))
    np.testing.assert_allclose(arrays[HEAD], mean_head(sent), rtol=1e-6)
    total = sum(WEIGHTS.values())
    assert metrics["loss"] == pytest.approx(sum(WEIGHTS[n] * n for n in RANKS) / total)


def test_the_order_of_replies_changes_no_bit():
    records = []
    for order in (list(RANKS), list(reversed(RANKS))):
        strategy = HetLoRA("rb", lora_alpha=ALPHA)
        record, _ = strategy.aggregate_train(1, (answer(node) for node in order))
        records.append({key: array.data for key, array in record.items()})
    assert records[0] == records[1]


def test_every_node_gets_its_own_rank_and_a_new_one_the_global_adapter(strategy, sent):
    record, _ = strategy.aggregate_train(1, [answer(node) for node in RANKS])
    config = ConfigRecord({"lr": 0.1})
    for configure in (strategy.configure_train, strategy.configure_evaluate):
        messages = by_node(configure(2, record, config, Grid([*RANKS, 99])))
        assert set(messages) == {*RANKS, 99}
        for node, rank in RANKS.items():
            assert_own(arrays_of(messages[node]), expected(sent), rank)
            said = messages[node].content["config"]
            assert (said["lr"], said["server-round"], said[DIVIDE]) == (0.1, 2, "")
        assert messages[99].content["config"][DIVIDE] == "AB"
        assert_global(arrays_of(messages[99]), expected(sent))


def test_receive_takes_the_leading_rank_whether_the_node_is_known_or_not(strategy, sent):
    record, _ = strategy.aggregate_train(1, [answer(node) for node in RANKS])
    messages = by_node(strategy.configure_train(2, record, ConfigRecord(), Grid([*RANKS, 99])))
    for node, rank in {**RANKS, 99: 3}.items():
        own = trained(1, rank=rank)
        start = receive(messages[node], own, lora_alpha=ALPHA)
        assert_own(start, expected(sent), rank)
        assert list(start) == list(own)


def test_the_first_round_starts_from_leading_rows_at_their_scale(strategy):
    fresh = trained(11) | {k: torch.zeros_like(trained(11)[k]) for k in KEYS if "_B" in k}
    messages = by_node(strategy.configure_train(1, ArrayRecord(fresh), ConfigRecord(), Grid()))
    for node, rank in RANKS.items():
        start = receive(messages[node], trained(node), lora_alpha=ALPHA)
        assert torch.equal(start[KEYS[0]], fresh[KEYS[0]][:rank])
        assert not start[KEYS[1]].any()


def test_receive_refuses_what_does_not_fit(strategy):
    record, _ = strategy.aggregate_train(1, [answer(node) for node in RANKS])
    messages = by_node(strategy.configure_train(2, record, ConfigRecord(), Grid()))
    with pytest.raises(InputValueError, match="last reply"):
        receive(messages[3], trained(11), lora_alpha=ALPHA)
    with pytest.raises(InputValueError, match="expected 4 arrays from the strategy HetLoRA, got 5"):
        receive(messages[3], {k: trained(3)[k] for k in KEYS}, lora_alpha=ALPHA)
    other = RecordDict({"arrays": record, "config": ConfigRecord()})
    with pytest.raises(InputValueError, match="from another one"):
        receive(instruction(3, other), trained(3), lora_alpha=ALPHA)


def test_absent_and_failing_nodes(strategy, sent):
    record, _ = strategy.aggregate_train(1, [answer(node) for node in RANKS])
    strategy.configure_train(2, record, ConfigRecord(), Grid())
    failed = Message(Error(0, "out of memory"), reply_to=instruction(11))
    later = {node: trained(node, round=2) for node in (3, 7)}
    after, _ = strategy.aggregate_train(2, [failed, *(answer(n, later[n]) for n in later)])
    previous = factors(record.to_torch_state_dict())
    assert_global(after.to_torch_state_dict(), expected(later, previous=previous))
    # The absent node comes back at the rank it had.
    messages = by_node(strategy.configure_train(3, after, ConfigRecord(), Grid()))
    assert len(arrays_of(messages[11])[KEYS[0]]) == RANKS[11]
    assert strategy.aggregate_train(3, [failed]) == (None, None)
    assert strategy.aggregate_train(3, []) == (None, None)


def test_methods_with_state_are_given_what_was_sent_out():
    strategy = HetLoRA("fedrot", lora_alpha=ALPHA, strength=0.7)
    record, _ = strategy.aggregate_train(1, [answer(node) for node in RANKS])
    noised = ArrayRecord({key: Array(array.numpy() + 0.1) for key, array in record.items()})
    strategy.configure_train(2, noised, ConfigRecord(), Grid())
    later = {node: trained(node, round=2) for node in RANKS}
    after, _ = strategy.aggregate_train(2, [answer(n, later[n]) for n in later])
    previous = factors(noised.to_torch_state_dict())
    wanted = expected(later, "fedrot", previous=previous, round=2, strength=0.7)
    assert_global(after.to_torch_state_dict(), wanted)


@pytest.mark.parametrize("said", [{"lora_alpha": 4.0}, {"scaling": 0.5}])
def test_scalings_come_from_the_replies_and_are_not_averaged(said, sent):
    strategy = HetLoRA("rb")
    record, metrics = strategy.aggregate_train(1, [answer(node, **said) for node in RANKS])
    scaling = (lambda rank: 4 / rank) if "lora_alpha" in said else (lambda rank: 0.5)
    assert_global(record.to_torch_state_dict(), expected(sent, scaling=scaling))
    assert not set(metrics) & {"lora_alpha", "scaling"}


def test_lists_without_names(sent):
    names = [*KEYS, HEAD]
    strategy = HetLoRA("rb", lora_alpha=ALPHA, keys=names)
    unnamed = {node: [sent[node][key].numpy() for key in names] for node in sent}
    record, _ = strategy.aggregate_train(1, [answer(n, unnamed[n]) for n in unnamed])
    assert list(record) == ["0", "1", "2", "3", "4"]
    made = dict(zip(names, record.to_numpy_ndarrays(), strict=True))
    assert_global(made, expected(sent))
    messages = by_node(strategy.configure_train(2, record, ConfigRecord(), Grid([*RANKS, 99])))
    for node, rank in {**RANKS, 99: 2}.items():
        start = receive(messages[node], trained(1, rank=rank), lora_alpha=ALPHA)
        assert_own(start, expected(sent), rank)
    with pytest.raises(InputValueError, match=r"node 3: expected 5 arrays.*got 4"):
        strategy.aggregate_train(2, [answer(3, unnamed[3][:4])])


def test_options_go_where_they_belong():
    strategy = HetLoRA("flexlora", lora_alpha=1, rank=3, fraction_train=0.5, min_train_nodes=1)
    assert (strategy.fraction_train, strategy.server.options) == (0.5, {"rank": 3})
    assert len(strategy.configure_train(1, ArrayRecord(trained(3)), ConfigRecord(), Grid())) == 1
    assert (
        HetLoRA(lora_alpha=1, fraction_train=0.0).configure_train(
            1, ArrayRecord(trained(3)), ConfigRecord(), Grid()
        )
        == []
    )
    with pytest.raises(InputTypeError, match="fraction_trian"):
        HetLoRA("rb", lora_alpha=1, fraction_trian=0.5)
    with pytest.raises(InputValueError, match="flora"):
        HetLoRA("flora", lora_alpha=1)


def content(arrays, metrics):
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (content(trained(7), {"loss": 1.0}), "node 7: expected one number as 'num-examples'"),
        (content(trained(7), {"num-examples": [1, 2]}), "node 7: expected one number"),
        (content(trained(7), {"num-examples": 1, "more": 2}), r"node 7: its metrics differ.*more"),
        (content({HEAD: trained(7)[HEAD]}, {"num-examples": 1}), "client 7: 4 keys differ"),
        (RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "node 7: expected one of arr"),
    ],
)
def test_bad_replies_are_errors_that_name_the_node(strategy, wrong, match):
    replies = [answer(3), Message(wrong, reply_to=instruction(7)), answer(11)]
    with pytest.raises(InputValueError, match=match):
        strategy.aggregate_train(1, replies)


def test_no_scaling_is_an_error_not_a_guess():
    with pytest.raises(InputValueError, match="client 3: expected scaling or lora_alpha"):
        HetLoRA("rb").aggregate_train(1, [answer(node) for node in RANKS])


def test_bfloat16_is_refused_with_the_remedy(strategy):
    half = trained(3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord(half)
    with pytest.raises(InputTypeError, match=r"bfloat16.*tensor\.float\(\)"):
        reply(half, 10)
    packed = content(trained(7), {"num-examples": 1})
    packed["arrays"][KEYS[0]] = Array("bfloat16", (3, 5), "torch.bfloat16", b"\0" * 30)
    with pytest.raises(InputTypeError, match=r"node 7: .*lora_A.*bfloat16"):
        strategy.aggregate_train(1, [answer(3), Message(packed, reply_to=instruction(7))])


def test_float16_comes_back_as_float16(strategy):
    record, _ = strategy.aggregate_train(
        1, [answer(node, trained(node, dtype=torch.float16)) for node in RANKS]
    )
    assert {array.dtype for array in record.values()} == {"float16"}


def test_the_example_runs_in_flowers_simulation():
    pytest.importorskip("ray")
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    accuracy = [float(line.split()[-1]) for line in ran.stdout.splitlines() if "accuracy" in line]
    assert len(accuracy) == 3
    assert accuracy[0] < 0.3 < 0.6 < accuracy[1] < accuracy[2]


def test_at_most_five_lines_of_the_example_concern_the_library():
    code = EXAMPLE.read_text().split('"""', 2)[2].splitlines()
    names = ("hetlora_agg", "HetLoRA(", "receive(", "reply(")
    concerned = [line for line in code if any(name in line for name in names)]
    assert len(concerned) <= 5


def test_the_pages_code_runs_as_pasted():
    pytest.importorskip("peft")
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), namespace)
