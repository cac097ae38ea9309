"""How our proxy agent tells the add-on agent of its pod that it needs no restart when its certificate is renewed."""

from __future__ import annotations

from typing import Final

#: In the answers of the proxy agent's health port. The original's has nothing of the kind: it has to be restarted.
RELOADS_HEADER: Final = "X-Clusterproxy-Reloads"
RELOADS_CERTIFICATES: Final = "certificates"
