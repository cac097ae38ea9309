"""``python -m clusterproxy``."""

from __future__ import annotations

from clusterproxy.cli.main import main

if __name__ == "__main__":
    main(prog_name="clusterproxy")
