"""Hypothesis profiles: `ci` by default; HYPOTHESIS_PROFILE=thorough, or fresh for other seeds."""

import os
import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("thorough", max_examples=5000, deadline=None, print_blob=True)
settings.register_profile("fresh", max_examples=200, deadline=None, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Triton reads it when it is first imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers share the cores; one thread each keeps them out of each other's way.
torch.set_num_threads(1)


@pytest.fixture
def usual_signals():
    """Python's own handlers: whatever started the tests may have the signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, own) for number, own in usual.items()}
    yield
    for number, own in before.items():
        signal.signal(number, own)
