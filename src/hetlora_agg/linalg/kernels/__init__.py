"""Kernels for what a library call does in several passes; each has a twin in plain torch.

Importing this package never imports triton. `MEASURED_WINS` says which kernels ``backend="auto"``
takes; it is empty until a GPU benchmark shows one ahead.
"""

from hetlora_agg.linalg.kernels.backend import MEASURED_WINS as MEASURED_WINS
from hetlora_agg.linalg.kernels.backend import Backend as Backend
from hetlora_agg.linalg.kernels.backend import available as available
from hetlora_agg.linalg.kernels.backend import selected as selected
from hetlora_agg.linalg.kernels.jacobi import Eigen as Eigen
from hetlora_agg.linalg.kernels.jacobi import jacobi as jacobi
from hetlora_agg.linalg.kernels.jacobi import jacobi_torch as jacobi_torch
from hetlora_agg.linalg.kernels.ragged_gram import UnitGram as UnitGram
from hetlora_agg.linalg.kernels.ragged_gram import ragged_gram as ragged_gram
from hetlora_agg.linalg.kernels.ragged_gram import ragged_gram_torch as ragged_gram_torch
from hetlora_agg.linalg.kernels.ragged_output import ragged_output as ragged_output
from hetlora_agg.linalg.kernels.ragged_output import ragged_output_torch as ragged_output_torch
