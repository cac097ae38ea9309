"""``python -m e2e [--image] [--demo] [ARGUMENT...]`` in tests/: build what is not there, then run the tests in namespaces of their own.

``--demo`` runs docs/demo/demo.py there instead. ``--image`` runs pods on the unpacked container image, which is built before (needs what tests/image needs); without it
they are the programs of this tree. The arguments are pytest's. With the run go its interfaces, mounts and processes, however
it ends. Without root the machine has to let users have namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import oidc
from go_tools import go_module_program, go_tool
from helm_programs import helm_program
from kube import build

TESTS = Path(__file__).parents[1]
IMAGE = "CLUSTERPROXY_E2E_IMAGE"


def main(arguments: list[str]) -> None:
    build.build()
    helm_program()
    go_module_program("./cmd/docsnippet")
    if not oidc.missing_node():
        # The run itself has no way to npm's packages.
        oidc.installed()
    if "--image" in arguments:
        arguments.remove("--image")
        os.environ[IMAGE] = str(unpacked_image())
    run: tuple[str, ...]
    if "--demo" in arguments:
        go_tool("server")
        go_tool("agent")
        os.environ["PYTHONPATH"] = str(TESTS)
        run = (sys.executable, str(TESTS.parent / "docs" / "demo" / "demo.py"))
    else:
        # Not among the folders of other runs, which are removed by the next ones.
        logs = TESTS.parent / "build" / "e2e"
        run = (
            *(sys.executable, "-m", "pytest", "-m", "e2e", str(TESTS / "e2e")),
            *("--tb=short", "--show-capture=no", "-p", "no:cacheprovider", f"--basetemp={logs}"),
            *arguments,
        )
    own_root = () if os.geteuid() == 0 else ("--map-root-user",)
    spaces = ("unshare", *own_root, "--net", "--mount", "--pid", "--fork", "--mount-proc")
    os.environ["CLUSTERPROXY_E2E"] = "1"
    os.chdir(TESTS.parent)
    os.execvp(spaces[0], (*spaces, "--kill-child", *run))  # noqa: S606


def unpacked_image() -> Path:
    sys.path.append(str(TESTS / "image"))
    # Of a folder that is on no path but here.
    engine_of = import_module("engine").Engine

    root = TESTS.parent / "build" / "e2e-image"
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder))
        archive = Path(folder, "files.tar")
        try:
            engine.build()
            engine.podman("create", "--name=files", engine.image, "/bin/sh")
            engine.podman("export", f"--output={archive}", "files")
        finally:
            engine.close()
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        subprocess.run(("tar", "--extract", f"--file={archive}"), cwd=root, check=True)
    return root


if __name__ == "__main__":
    main(sys.argv[1:])
