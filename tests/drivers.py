"""The exact drivers with the input each is declared for, as pytest parametrisations."""

import pytest
import torch

F32, F64 = torch.float32, torch.float64

# gram squares condition numbers in float64: its declared class is input up to float32
EXACT = [("gram", F32), ("qr", F32), ("qr", F64), ("dense", F32), ("dense", F64)]
DRIVERS = [*EXACT, ("auto", F32), ("auto", F64)]


def _each(drivers):
    names = [f"{name}-{str(dtype)[6:]}" for name, dtype in drivers]
    return pytest.mark.parametrize(("driver", "dtype"), drivers, ids=names)


exact_driver, every_driver = _each(EXACT), _each(DRIVERS)
