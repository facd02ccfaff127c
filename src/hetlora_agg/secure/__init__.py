"""Messages that add up: what clients send under secure aggregation, and the result of their sum.

A secure sum shows the server the total of all messages and nothing else. The protocol that adds
them is the caller's; here are messages of one shape, the integers it adds, and the way back.
"""

from hetlora_agg.secure.fixed_point import from_fixed as from_fixed
from hetlora_agg.secure.fixed_point import most_bits as most_bits
from hetlora_agg.secure.fixed_point import to_fixed as to_fixed
from hetlora_agg.secure.messages import linear_message as linear_message
from hetlora_agg.secure.sums import from_sum as from_sum

__all__ = ["from_fixed", "from_sum", "linear_message", "most_bits", "to_fixed"]
