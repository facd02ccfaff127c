"""One file per method; importing one enters it in ``METHODS``."""

from hetlora_agg.methods.dare import dare as dare
from hetlora_agg.methods.fair import fair as fair
from hetlora_agg.methods.fedask import fedask as fedask
from hetlora_agg.methods.fedex import fedex as fedex
from hetlora_agg.methods.fedhl import fedhl as fedhl
from hetlora_agg.methods.fedit import fedit as fedit
from hetlora_agg.methods.fedrot import fedrot as fedrot
from hetlora_agg.methods.fedsa import fedsa as fedsa
from hetlora_agg.methods.ffa import ffa as ffa
from hetlora_agg.methods.flexlora import flexlora as flexlora
from hetlora_agg.methods.flora import flora as flora
from hetlora_agg.methods.glora import glora as glora
from hetlora_agg.methods.hafl import hafl as hafl
from hetlora_agg.methods.hetlora import hetlora as hetlora
from hetlora_agg.methods.ilora import ilora as ilora
from hetlora_agg.methods.median import median as median
from hetlora_agg.methods.plora import plora as plora
from hetlora_agg.methods.raflora import raflora as raflora
from hetlora_agg.methods.rb import rb as rb
from hetlora_agg.methods.rbla import rbla as rbla
from hetlora_agg.methods.replicate import replicate as replicate
from hetlora_agg.methods.rolora import rolora as rolora
from hetlora_agg.methods.shared_a import shared_a as shared_a
from hetlora_agg.methods.ties import ties as ties
from hetlora_agg.methods.trimmed_mean import trimmed_mean as trimmed_mean
from hetlora_agg.methods.zeropad import zeropad as zeropad
