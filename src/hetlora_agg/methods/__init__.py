"""One file per method; importing one enters it in ``METHODS``."""

from hetlora_agg.methods.fedex import fedex as fedex
from hetlora_agg.methods.fedit import fedit as fedit
from hetlora_agg.methods.flexlora import flexlora as flexlora
from hetlora_agg.methods.flora import flora as flora
from hetlora_agg.methods.hetlora import hetlora as hetlora
from hetlora_agg.methods.raflora import raflora as raflora
from hetlora_agg.methods.rb import rb as rb
from hetlora_agg.methods.rbla import rbla as rbla
from hetlora_agg.methods.replicate import replicate as replicate
from hetlora_agg.methods.zeropad import zeropad as zeropad
