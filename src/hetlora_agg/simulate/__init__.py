"""The reference simulator: a federation of LoRA clients on real digits, small enough to read.

`simulate` runs one method, `simulate_many` several on the same data, start and client splits. Every
method's clients do what belongs to it: `SIDES`.
"""

from hetlora_agg.simulate.attacks import ATTACKS as ATTACKS
from hetlora_agg.simulate.attacks import Attack as Attack
from hetlora_agg.simulate.attacks import RankInflation as RankInflation
from hetlora_agg.simulate.attacks import Scale as Scale
from hetlora_agg.simulate.attacks import SignFlip as SignFlip
from hetlora_agg.simulate.data import dirichlet_split as dirichlet_split
from hetlora_agg.simulate.data import load_digits as load_digits
from hetlora_agg.simulate.federation import Federation as Federation
from hetlora_agg.simulate.federation import build_federation as build_federation
from hetlora_agg.simulate.federation import draw_cohorts as draw_cohorts
from hetlora_agg.simulate.loop import run as run
from hetlora_agg.simulate.report import record_of as record_of
from hetlora_agg.simulate.report import table_of as table_of
from hetlora_agg.simulate.result import SAMPLINGS as SAMPLINGS
from hetlora_agg.simulate.result import Settings as Settings
from hetlora_agg.simulate.result import SimulationResult as SimulationResult
from hetlora_agg.simulate.runs import simulate as simulate
from hetlora_agg.simulate.runs import simulate_many as simulate_many
from hetlora_agg.simulate.sides import SIDES as SIDES
from hetlora_agg.simulate.theory import Collapse as Collapse
from hetlora_agg.simulate.theory import IdleRecursion as IdleRecursion
from hetlora_agg.simulate.theory import Rescue as Rescue
from hetlora_agg.simulate.theory import StrongAndWeak as StrongAndWeak
from hetlora_agg.simulate.theory import collapse_in_training as collapse_in_training
from hetlora_agg.simulate.theory import dilution_and_rescue as dilution_and_rescue
from hetlora_agg.simulate.theory import idle_recursion as idle_recursion
from hetlora_agg.simulate.traffic import Costs as Costs
