"""Batched decompositions of products of factors. Knows matrices, no federated-learning words."""

from hetlora_agg.linalg.bases import column_space as column_space
from hetlora_agg.linalg.bases import nearest_isometry as nearest_isometry
from hetlora_agg.linalg.bases import orthonormal_columns as orthonormal_columns
from hetlora_agg.linalg.bases import row_space as row_space
from hetlora_agg.linalg.bases import solve_gram as solve_gram
from hetlora_agg.linalg.certificate import Certificate as Certificate
from hetlora_agg.linalg.door import all_finite as all_finite
from hetlora_agg.linalg.execution import limited as limited
from hetlora_agg.linalg.memory import predicted_bytes as predicted_bytes
from hetlora_agg.linalg.precision import exact_arithmetic as exact_arithmetic
from hetlora_agg.linalg.products import cast_error as cast_error
from hetlora_agg.linalg.products import component_inner_products as component_inner_products
from hetlora_agg.linalg.products import component_peaks as component_peaks
from hetlora_agg.linalg.products import product_norm as product_norm
from hetlora_agg.linalg.products import squared_norms as squared_norms
from hetlora_agg.linalg.select import select_driver as select_driver
from hetlora_agg.linalg.solution import norms as norms
from hetlora_agg.linalg.svd import SPLITS as SPLITS
from hetlora_agg.linalg.svd import SVD as SVD
from hetlora_agg.linalg.svd import as_dtype as as_dtype
from hetlora_agg.linalg.svd import leading_svd as leading_svd
from hetlora_agg.linalg.svd import svd_product as svd_product
