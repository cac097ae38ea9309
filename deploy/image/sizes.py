"""Print what an image's files weigh, by its parts, in MiB.

``podman run --rm -i IMAGE python -I - < deploy/image/sizes.py``. A file of several names counts once, and only what its content
has; what a storage driver or a registry needs for it is another figure.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter

_HOME = "/opt/clusterproxy"
_MIB = 1 << 20
_LARGEST = 6


def main() -> None:
    """Walk through the file system that this runs in."""
    parts: Counter[str] = Counter()
    compiled = 0
    libraries: Counter[str] = Counter()
    standard = sysconfig.get_path("stdlib")
    packages = sysconfig.get_path("purelib")
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk("/"):
        # Other file systems are not the image's.
        below[:] = [name for name in below if not os.path.ismount(os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            part = _part(path, standard, packages)
            parts[part] += found.st_size
            if name.endswith(".pyc"):
                compiled += found.st_size
            if part == "libraries of PyPI" and path.startswith(packages):
                library = path[len(packages) + 1 :].partition("/")[0]
                libraries[library.partition("-")[0].partition(".")[0].lower()] += found.st_size
    for part, size in [*parts.most_common(), ("all", parts.total())]:
        print(f"{size / _MIB:7.1f}  {part}")  # noqa: T201
    print(f"{compiled / _MIB:7.1f}  of it bytecode")  # noqa: T201
    largest = ", ".join(
        f"{name} {size / _MIB:.1f}" for name, size in libraries.most_common(_LARGEST)
    )
    print(f"The largest libraries: {largest}")  # noqa: T201


def _part(path: str, standard: str, packages: str) -> str:
    if path == "/kubectl":
        return "kubectl"
    if path.startswith((f"{packages}/clusterproxy/", f"{packages}/clusterproxy_proto/")):
        return "our programs"
    if path.startswith(_HOME):
        return "libraries of PyPI"
    if path.startswith(f"{standard}/") or os.path.basename(path).startswith(
        ("python3", "libpython3")
    ):
        return "Python"
    return "the base's system"


if __name__ == "__main__":
    main()
