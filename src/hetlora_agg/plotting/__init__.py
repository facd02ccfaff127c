"""Pictures of simulations, spectra and theory; matplotlib is imported when the first is drawn."""

from hetlora_agg.plotting.contributions import plot_contributions as plot_contributions
from hetlora_agg.plotting.drawing import COLOURS as COLOURS
from hetlora_agg.plotting.drawing import DASHES as DASHES
from hetlora_agg.plotting.drawing import NAME_POINTS as NAME_POINTS
from hetlora_agg.plotting.drawing import Curve as Curve
from hetlora_agg.plotting.drawing import require_matplotlib as require_matplotlib
from hetlora_agg.plotting.simulation import EXACT as EXACT
from hetlora_agg.plotting.simulation import Runs as Runs
from hetlora_agg.plotting.simulation import plot_energy as plot_energy
from hetlora_agg.plotting.simulation import plot_simulation as plot_simulation
from hetlora_agg.plotting.spectrum import MOST_NAMED_LAYERS as MOST_NAMED_LAYERS
from hetlora_agg.plotting.spectrum import plot_spectrum as plot_spectrum
from hetlora_agg.plotting.theory import plot_collapse as plot_collapse
from hetlora_agg.plotting.theory import plot_rescue as plot_rescue
