"""The six ways in, for the same clients: tensors, layers, streams, state dicts, folders, commands.

Each takes `ClientUpdate`s of one layer, ids ``phone``, ``tablet``, …, brings them into its own
form, and gives the result's dense matrix; a refusal comes out as the error, of the command line as
`Complaint` with the exit code.
"""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file

from hetlora_agg import METHODS, ClientUpdate, aggregate, aggregate_layers
from hetlora_agg.adapters import aggregate_adapters, aggregate_state_dicts, read_adapter
from hetlora_agg.cli import main
from hetlora_agg.streaming import RunningAggregate

LAYER = "h.0.q"
KEYS = tuple(f"base_model.model.{LAYER}.lora_{factor}.weight" for factor in "AB")
NAMES = ("phone", "tablet", "laptop", "watch")
OUT, IN = 7, 5
RANKS = (1, 2, 3, 4, 5)


class Complaint(Exception):
    """What the command line said, and its exit code."""

    def __init__(self, code, line):
        super().__init__(line)
        self.code = code


@dataclass
class Sent:
    """Clients, and what is asked for besides."""

    updates: list
    method: str = "rb"
    options: dict = None


def client(rank=2, seed=0, dtype=torch.float32, out=OUT, in_=IN, layers=(), **fields):
    """A client that nobody objects to."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*layers, rank, in_, generator=g, dtype=torch.float64).to(dtype)
    B = torch.randn(*layers, out, rank, generator=g, dtype=torch.float64).to(dtype)
    return ClientUpdate(A, B, **{"id": NAMES[seed], **fields})


def config_of(update):
    """The config of a client: its declared rank, and the alpha of its scaling."""
    rank = len(update.A) if update.rank is None else update.rank
    alpha = update.scaling * rank if isinstance(rank, (int, float)) and rank > 0 else 1
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}


def by_tensor(sent, tmp_path):
    """`aggregate`."""
    return dense(aggregate(sent.updates, sent.method, **(sent.options or {})).total())


def by_layers(sent, tmp_path):
    """`aggregate_layers`."""
    results = aggregate_layers({LAYER: sent.updates}, sent.method, **(sent.options or {}))
    return dense(results[LAYER].total())


def by_stream(sent, tmp_path):
    """`RunningAggregate.add`, one client after the other; a refusal leaves it as it was."""
    sums = getattr(METHODS.get(sent.method), "sums", None)
    levels = {"levels": RANKS} if sums == "products" else {}
    running = RunningAggregate(sent.method, **levels, **(sent.options or {}))
    for u in sent.updates:
        before = running.receipts
        try:
            running.add(u, id=u.id)
        except Exception:
            assert running.receipts == before
            raise
    return dense(running.result().total())


def by_state_dict(sent, tmp_path):
    """`aggregate_state_dicts`."""
    outcome = aggregate_state_dicts(
        {u.id: dict(zip(KEYS, (u.A, u.B), strict=True)) for u in sent.updates},
        {u.id: config_of(u) for u in sent.updates},
        weights={u.id: u.weight for u in sent.updates},
        method=sent.method,
        **(sent.options or {}),
    )
    return dense(outcome.results[LAYER].total())


def folders_of(sent, tmp_path):
    """The clients' folders on disk, written by nobody's checks but safetensors'."""
    paths = {}
    for u in sent.updates:
        folder = tmp_path / "in" / u.id
        if not folder.exists():
            folder.mkdir(parents=True)
            tensors = zip(KEYS, (u.A, u.B), strict=True)
            as_torch = {
                k: (
                    torch.tensor(X) if isinstance(X, np.ndarray) else X.detach().clone()
                ).contiguous()
                for k, X in tensors
            }
            save_file(as_torch, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config_of(u)))
        paths[u.id] = folder
    return paths


def by_folder(sent, tmp_path):
    """`aggregate_adapters`, the global adapter written."""
    paths = folders_of(sent, tmp_path)
    weights = {u.id: u.weight for u in sent.updates}
    outcome = aggregate_adapters(paths, weights, sent.method, **(sent.options or {}))
    outcome.write(tmp_path / "out")
    return dense(outcome.results[LAYER].total())


def by_command(sent, tmp_path):
    """``hetlora-agg aggregate``, in this process."""
    paths = folders_of(sent, tmp_path)
    command = ["aggregate", *map(str, paths.values()), "-o", str(tmp_path / "out")]
    command += [
        "--method",
        sent.method,
        f"--weights={','.join(str(u.weight) for u in sent.updates)}",
    ]
    for name, value in (sent.options or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        own = name == "memory_limit"
        command += ["--memory-limit", text] if own else ["--option", f"{name}={text}"]
    run_command(command)
    written = read_adapter(tmp_path / "out").factors(LAYER)
    return dense(written)


def run_command(command):
    """The command line; a failure as a `Complaint`, which must be one line and no traceback."""
    errors, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(errors), redirect_stdout(printed):
        try:
            code = main(command)
        except SystemExit as left:
            code = left.code
    if code:
        lines = errors.getvalue().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("hetlora-agg: error: ")
        assert not printed.getvalue(), "a failure prints no result"
        raise Complaint(code, lines[0])


DOORS = {
    "tensor": by_tensor,
    "layers": by_layers,
    "stream": by_stream,
    "state dict": by_state_dict,
    "folder": by_folder,
    "command": by_command,
}


def dense(low_rank):
    """``B @ A`` in float64."""
    A, B = (np.asarray(torch.as_tensor(X).double()) for X in (low_rank.A, low_rank.B))
    return B @ A


def memory(X):
    """Every byte of a tensor's storage or an array, where it is an ordinary one."""
    if isinstance(X, np.ndarray):
        return X.strides, X.tobytes()
    if isinstance(X, torch.Tensor) and X.layout == torch.strided and not X.is_meta:
        return X.stride(), bytes(X.detach().untyped_storage())
    return type(X)


def tree(folder):
    """Everything below a folder: links as links, files with their bytes and times of change."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink()
        else (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }  # fmt: skip
