"""Adapter folders that are nearly right: mutants of a safetensors file and of its config."""

import copy
import json
import os
import struct

import numpy as np
from hypothesis import strategies as st

LAYER = "h.0.q"
KEYS = tuple(f"base_model.model.{LAYER}.lora_{factor}.weight" for factor in "AB")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
OUT, IN = 4, 3
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def factors(rank=2, seed=0):
    """A and B as bytes and shapes, in the order of ``KEYS``."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((rank, IN)).astype("<f4")
    return A, rng.standard_normal((OUT, rank)).astype("<f4")


def header(arrays):
    """The header of a safetensors file of these arrays."""
    entries, start = {}, 0
    for key, X in zip(KEYS, arrays, strict=True):
        end = start + X.nbytes
        entries[key] = {"dtype": "F32", "shape": list(X.shape), "data_offsets": [start, end]}
        start = end
    return entries


def packed(text, body, length=None):
    """Length of the header, header, data."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length % 2**64) + raw + body


def write(folder, weights, config):
    """A folder of these two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / SETTINGS).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def sound(folder, rank=2, seed=0):
    """A folder that nobody objects to."""
    arrays = factors(rank, seed)
    body = b"".join(X.tobytes() for X in arrays)
    return write(folder, packed(json.dumps(header(arrays)), body), {**CONFIG, "r": rank})


HUGE = 2**63
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 5, 24, 56, 57, 2**31, 2**40, HUGE, 2**64, 10**30, 0.5, None]
)
DTYPES = ["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "f32", "", "\ud7ff", None, 3]
PREFIXES = [b"PK\x03\x04", b"\x80\x04", b"\x80\x02", b"\x7fELF", b"\x1f\x8b", b"GGUF", b"{", b""]
NAMES = [
    "../../etc/passwd", "/etc/passwd", "", "\0", "a" * 5000, "__metadata__", "lora_A",
    "..lora_A.weight",
    "base_model.model..lora_A.weight", "base_model.model.h.0.q.lora_A.x.weight", KEYS[0].upper(),
    "base_model.model.h.0.q.lora_B.bias", "base_model.model.h.0.q.lora_magnitude_vector",
    "base_model.model.lm_head.weight", "base_model.model.(.*+.lora_A.weight",
]  # fmt: skip


@st.composite
def headers(draw, entries):
    """The header with one thing wrong."""
    entries = copy.deepcopy(entries)
    key = draw(st.sampled_from(KEYS))
    kind = draw(
        st.sampled_from(["dtype", "shape", "offsets", "field", "name", "extra", "metadata"])
    )
    if kind == "dtype":
        entries[key]["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        entries[key]["shape"] = draw(st.lists(NUMBERS, max_size=4) | NUMBERS)
    elif kind == "offsets":
        entries[key]["data_offsets"] = draw(st.lists(NUMBERS, max_size=3) | NUMBERS)
    elif kind == "field":
        del entries[key][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))]
    elif kind == "name":
        entries[draw(st.sampled_from(NAMES))] = entries.pop(key)
    elif kind == "extra":
        entries[draw(st.sampled_from(NAMES))] = copy.deepcopy(entries[key])
    else:
        entries["__metadata__"] = draw(st.sampled_from([{"format": "pt"}, {"a": 1}, [], None, "x"]))
    return entries


@st.composite
def weights(draw):
    """The bytes of a safetensors file with one thing wrong."""
    arrays = factors()
    body = b"".join(X.tobytes() for X in arrays)
    entries = header(arrays)
    text = json.dumps(entries)
    kind = draw(st.sampled_from(
        ["header", "header", "header", "length", "cut", "more", "magic", "text", "flip", "value"]
    ))  # fmt: skip
    if kind == "header":
        return packed(json.dumps(draw(headers(entries))), body)
    if kind == "length":
        return packed(text, body, draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1,
                      100_000_001, 2**31, HUGE, 2**64 - 1])))  # fmt: skip
    whole = packed(text, body)
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "more":
        return whole + draw(st.binary(min_size=1, max_size=20))
    if kind == "magic":
        return draw(st.sampled_from(PREFIXES)) + draw(st.sampled_from([whole, b"", body]))
    if kind == "text":
        return packed(draw(st.sampled_from([
            "[" * 5000, '{"a":' * 5000, "null", "[]", "{}", text[:-1], text + text, "NaN", '"x"',
            text[:-1] + "," + text[1:], b"\xff\xfe" + text.encode(), text.replace('"F32"', "1e999"),
        ])), body)  # fmt: skip
    place = draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        return (
            whole[:place]
            + bytes([whole[place] ^ 1 << draw(st.integers(0, 7))])
            + whole[place + 1 :]
        )
    special = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0]))
    values = np.frombuffer(body, "<f4").copy()
    values[draw(st.integers(0, len(values) - 1))] = special
    return packed(text, values.tobytes())


ODD = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 0.5, 2.0, 1e308, 1e-320, 10**30, 10**400, "", "2", "q", "(",
     "(a+)+$",
     "x" * 5000, [], ["q"], [1], [[]], {}, {"q": 2}, {"q": "x"}, {"(": 2}, {"": 1}, {"q": {"q": 1}},
     {LAYER: 3}, "../../x", "__import__('os').system('false')"]
)  # fmt: skip
FIELDS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias",
    "modules_to_save", "target_modules", "peft_type", "task_type", "init_lora_weights", "auto_map",
    "auto_mapping", "fan_in_fan_out", "base_model_name_or_path", "revision", "layers_to_transform",
    "layers_pattern", "loftq_config", "megatron_core", "trust_remote_code", "custom_code",
    "new_field",
    "layer_replication", "runtime_config", "exclude_modules", "inference_mode", "peft_version",
]  # fmt: skip
TEXTS = [
    "", "{", "[]", "null", "3", '"x"', "NaN", '{"r": NaN}', "[" * 100_000, '{"a":' * 100_000,
    '{"r": 1e999, "lora_alpha": 1, "peft_type": "LORA"}',
    '{"r": ' + "9" * 5000 + ', "lora_alpha": 1, "peft_type": "LORA"}',
    '{"r": 2, "lora_alpha": Infinity, "peft_type": "LORA"}',
    '{"r": 2, "r": 3, "lora_alpha": 4, "peft_type": "LORA"}',
    '{"r": 2, "lora_alpha": 4, "peft_type": "LORA", "r": 2}',
    '{"r": 2, "lora_alpha": 4, "peft_type": "\\ud800"}',
    b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\x00" * 64, b"\x80\x04\x95", b"PK\x03\x04",
]  # fmt: skip


@st.composite
def configs(draw):
    """A config with one or two things wrong."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(TEXTS))
    config = dict(CONFIG)
    for _ in range(draw(st.integers(1, 2))):
        field = draw(st.sampled_from(FIELDS))
        if draw(st.integers(0, 4)) == 0:
            config.pop(field, None)
        else:
            config[field] = draw(ODD)
    return config


def link_loop(folder):
    """A weights file that leads to itself."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def link_to_device(folder):
    """A weights file that is a device which never ends."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def config_device(folder):
    """A config that is a device which never ends."""
    (folder / SETTINGS).unlink()
    (folder / SETTINGS).symlink_to("/dev/zero")


def fifo(name):
    """One of the two files is a pipe that nobody writes to."""

    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def as_folder(name):
    """One of the two files is a folder."""

    def spoil(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def link_out(folder):
    """A weights file outside of everything that is no adapter's."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/passwd")


def nowhere(folder):
    """A weights file that leads to nothing."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "nothing")


PLACES = {
    "a link to itself": link_loop,
    "a device": link_to_device,
    "a config that is a device": config_device,
    "a pipe": fifo(WEIGHTS),
    "a config that is a pipe": fifo(SETTINGS),
    "a folder": as_folder(WEIGHTS),
    "a config that is a folder": as_folder(SETTINGS),
    "a link to another file": link_out,
    "a link to nothing": nowhere,
}
