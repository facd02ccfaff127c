"""Federated frameworks: one server and its clients, and thin wrappers for Flower and NVFlare.

`Server` is what every framework's server needs: it reads state dicts, keeps what methods carry
from round to round and knows every client's ranks. `leading` is its counterpart on the client. No
framework is imported here; ``hetlora_agg.integrations.flower`` and ``….nvflare`` can be imported
without theirs, and using them then says what to install.
"""

from hetlora_agg.integrations.handing import leading as leading
from hetlora_agg.integrations.server import Reply as Reply
from hetlora_agg.integrations.server import Server as Server
