"""Two statements of the literature as runs: rank collapse, and dilution with its rescue."""

from hetlora_agg.simulate.theory.collapse import MOSTLY_SMALL as MOSTLY_SMALL
from hetlora_agg.simulate.theory.collapse import Collapse as Collapse
from hetlora_agg.simulate.theory.collapse import IdleRecursion as IdleRecursion
from hetlora_agg.simulate.theory.collapse import collapse_in_training as collapse_in_training
from hetlora_agg.simulate.theory.collapse import idle_recursion as idle_recursion
from hetlora_agg.simulate.theory.rescue import CONTENDERS as CONTENDERS
from hetlora_agg.simulate.theory.rescue import Rescue as Rescue
from hetlora_agg.simulate.theory.rescue import StrongAndWeak as StrongAndWeak
from hetlora_agg.simulate.theory.rescue import dilution_and_rescue as dilution_and_rescue
