"""Aggregation that a part of the clients cannot spoil, in product space, for any ranks."""

from hetlora_agg.robustness.answers import centered_clip as centered_clip
from hetlora_agg.robustness.answers import geomed as geomed
from hetlora_agg.robustness.answers import multi_krum as multi_krum
from hetlora_agg.robustness.distances import squared_distances as squared_distances
from hetlora_agg.robustness.rules import Rule as Rule
from hetlora_agg.robustness.rules import nnm as nnm
from hetlora_agg.robustness.rules import norm_clip as norm_clip
from hetlora_agg.robustness.trimming import trimmed_core as trimmed_core
