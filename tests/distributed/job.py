"""What every process of a real job does: ``torchrun --max-restarts 1 job.py FOLDER``.

First everything is checked on all processes and on two pairs of them. Then one is killed; after the
restart all go on from the checkpoint.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import hetlora_agg
from hetlora_agg import HetLoRAError, distributed
from hetlora_agg.robustness import geomed, nnm
from streamed import assert_same, clients_for, filled, one_shot, told_for

LAYERS = {"q": (9, 7), "k": (9, 7), "v": (6, 8), "o": (5, 5), "up": (9, 7)}
COUNT = 48
HALF = COUNT // 2
EPS = torch.finfo(torch.float64).eps
GATE = 10 * 9 * EPS


def by_layer(clients):
    return {layer: [own[layer] for own in clients if layer in own] for layer in LAYERS}


def same_bits(found, expected):
    return all(
        torch.equal(found[layer].A, other.A) and torch.equal(found[layer].B, other.B)
        for layer, other in expected.items()
    )


def refused(call, text, family=HetLoRAError):
    """The call raises, and says this; pytest itself would take longer to import than all else."""
    caught = None
    try:
        call()
    except family as error:
        caught = error
    assert caught is not None, f"not refused: {text}"
    assert text in str(caught)
    return str(caught)


def check_layers(group, every):
    cases = [
        ("flexlora", {}), ("flora", {}), ("rb", {}), ("rbla", {}), ("hetlora", {}), ("zeropad", {}),
        ("flexlora", {"weighting": nnm(1).then(geomed(1))}),
        ("hetlora", {"missing": "zero"}), ("hetlora", {"on_bad_client": "drop"}),
    ]  # fmt: skip
    for name, options in cases[::every]:
        clients = clients_for(name, 9, sizes=LAYERS)
        layers = by_layer(clients)
        if "missing" in options:
            layers["v"] = layers["v"][1:]
        if "on_bad_client" in options:
            layers["v"][2].A[0, 0] = torch.nan
        expected = hetlora_agg.aggregate_layers(layers, name, **options)
        mine = {layer: layers[layer] for layer in distributed.own(list(layers), group=group)}
        own = distributed.aggregate_layers(mine, name, group=group, **options)
        assert list(own) == list(mine)
        found = distributed.gather(own, group=group)
        if "on_bad_client" in options:
            assert [id for id, _ in found["q"].excluded] == [2]
            clients = [c for k, c in enumerate(clients) if k != 2]
        assert_same({layer: found[layer] for layer in layers}, expected, clients, gate=GATE)


def check_clients(group, every):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    clients = clients_for("rb", COUNT, sizes=LAYERS)
    roster = [(own["q"].id, own["q"].A.shape[-2], own["q"].weight) for own in clients]
    cases = [
        ("flexlora", {"rank": 3}, {"rank": 3}), ("flora", {}, {}),
        ("rb", {"levels": [1, 2, 4]}, {}),
        ("rb", {"roster": roster, "floor": 0.2}, {"floor": 0.2}), ("rbla", {}, {}),
        ("hetlora", {}, {}), ("zeropad", {}, {}),
    ]  # fmt: skip
    for name, told, options in cases[::every]:
        running = filled(name, clients[rank::size], **told_for(name) | told)
        assert running._state.kept is None
        found = distributed.result(running, group=group)
        assert_same(found, one_shot(name, clients, **options), clients)
    merged = distributed.merge(running, group=group)
    assert sorted(merged.receipts) == list(range(COUNT))
    assert_same(merged.result(), found, clients)


def check_checkpoints(folder, pair):
    rank, size = dist.get_rank(), dist.get_world_size()
    clients = clients_for("flexlora", COUNT, sizes=LAYERS)
    running = filled("flexlora", clients[rank::size])
    distributed.save(running, folder)
    assert distributed.load(folder).receipts == running.receipts
    # Both pairs read everything: half as many processes as wrote.
    fewer = distributed.load(folder, group=pair)
    assert len(fewer.receipts) == 2 * COUNT // size
    found = distributed.result(fewer, group=pair)
    assert_same(found, one_shot("flexlora", clients), clients)


def check_refusals(others):
    rank = dist.get_rank()
    clients = clients_for("flexlora", 4, sizes=LAYERS)
    twice = filled("flexlora", clients_for("flexlora", COUNT))
    for call in (distributed.merge, distributed.result):
        refused(lambda call=call: call(twice), "client 0 is in the sums of both")
    other = filled("flexlora", clients, rank=1 + rank)
    refused(lambda: distributed.result(other), "options differ between processes 0 and 1")
    layers = by_layer(clients)
    layers["k"][2].A[0, 0] = torch.inf
    mine = {layer: layers[layer] for layer in distributed.own(list(layers))}
    refused(lambda: distributed.aggregate_layers(mine), "layer 'k', lora_A")
    refused(
        lambda: distributed.gather({}) if rank else distributed.receipts(twice),
        "process 0 is in 'receipts: settings', process 1 in 'gather",
    )
    refused(lambda: distributed.receipts(twice, group=others), "this process is not in it")
    # Nothing is left over: the next call is as good as ever.
    assert distributed.gather({}) == {}


def killed(folder, attempt):
    """A process dies after a checkpoint; started again, all go on from there."""
    # The launcher would end who is about to find out.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, size = dist.get_rank(), dist.get_world_size()
    clients = clients_for("hetlora", COUNT, sizes=LAYERS)
    running = distributed.load(folder) or filled("hetlora", [])
    before = distributed.receipts(running)
    assert len(before) == (0 if attempt == "0" else HALF)
    # Fed again from the start; who has a receipt changes nothing.
    for own in clients[rank:HALF:size]:
        running.add(own, id=own["q"].id)
    distributed.save(running, folder)
    for own in clients[HALF + rank :: size]:
        running.add(own, id=own["q"].id)
    if attempt == "0" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        found = distributed.result(running)
    except HetLoRAError as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)
    assert_same(found, one_shot("hetlora", clients), clients)
    (folder / f"equal-{rank}.txt").write_text(attempt)


def check_silence(folder, group):
    """A process that does not come is named by all others within the group's timeout."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 1:
        until = time.monotonic() + 20
        while time.monotonic() < until and len(list(folder.glob("named-*"))) < size - 1:
            time.sleep(0.05)
        return
    begun = time.monotonic()
    text = f"distributed.receipts, process {rank}, step 'settings': process 1 did not come"
    running = filled("flexlora", [])
    said = refused(
        lambda: distributed.receipts(running, group=group), text, distributed.ProcessLostError
    )
    assert "load(folder)" in said
    assert time.monotonic() - begun < 15
    (folder / f"named-{rank}").touch()


def main(folder):
    """All of it; ``attempt`` is how often the launcher has started the job again."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0":
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        own, others = pairs if rank < 2 else reversed(pairs)
        hasty = dist.new_group(timeout=timedelta(seconds=2))
        for group, every in ((None, 1), (own, 3)):
            check_layers(group, every)
            check_clients(group, every)
        check_checkpoints(folder / "checked", own)
        check_refusals(others)
        dist.barrier()
        check_silence(folder, hasty)
        (folder / f"checked-{rank}.txt").touch()
    killed(folder, attempt)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
