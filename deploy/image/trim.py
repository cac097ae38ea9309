"""Take from the base image what nothing here needs at run time, and compile the standard library.

Runs in the stage of the final image's root, with that image's own Python. The official images have the standard library without
bytecode, so that every start of a program would compile what it imports, for a read-only root keeps none.
"""

from __future__ import annotations

import compileall
import py_compile
import shutil
import sys
import sysconfig
from pathlib import Path

# Installers, things with windows, and tests.
_UNUSED = (
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tkinter",
    "turtledemo",
    "turtle.py",
    "venv",
)


def main() -> None:
    """Change the file system that this runs in."""
    library = Path(sysconfig.get_path("stdlib"))
    wheels = sysconfig.get_config_var("WHEEL_PKG_DIR")
    unused = [library / name for name in _UNUSED]
    unused += library.glob("config-*")
    unused += [Path(name) for name in (sysconfig.get_path("include"), wheels) if name]
    # The programs see none of these: they have a virtual environment.
    unused += Path(sysconfig.get_path("purelib")).glob("*")
    scripts = Path(sysconfig.get_path("scripts"))
    unused += [
        path for name in ("pip", "idle", "pydoc", "2to3") for path in scripts.glob(f"{name}*")
    ]
    for path in unused:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    compiled = compileall.compile_dir(
        library,
        quiet=1,
        force=True,
        workers=0,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    sys.exit(not compiled)


if __name__ == "__main__":
    main()
