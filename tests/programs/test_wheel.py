"""The wheel holds what it should, and runs with what requirements/runtime.txt names and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clusterproxy import __version__

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env={}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    run(*PIP, *build, "-w", directory, ROOT, cwd=directory)
    (found,) = directory.glob("*.whl")
    return found


def test_contents(wheel: Path) -> None:
    assert wheel.name == f"clusterproxy-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"clusterproxy-{__version__}.dist-info/METADATA").decode()
    tops = {"clusterproxy", "clusterproxy_proto", f"clusterproxy-{__version__}.dist-info"}
    assert {name.partition("/")[0] for name in names} == tops
    packages = {
        path.relative_to(ROOT / "src").as_posix()
        for suffix in ("*.py", "*.proto", "py.typed")
        for path in (ROOT / "src").rglob(suffix)
    }
    assert {"clusterproxy/py.typed", "clusterproxy_proto/py.typed"} <= packages
    assert {name for name in names if ".dist-info/" not in name} == packages
    assert f"clusterproxy-{__version__}.dist-info/licenses/LICENSE" in names
    assert "Description-Content-Type: text/markdown" in metadata
    assert "\n# clusterproxy\n" in metadata


def locked() -> list[str]:
    """What requirements/runtime.txt installs on this platform."""
    text = (ROOT / "requirements" / "runtime.txt").read_text()
    found = [Requirement(line) for line in re.findall(r"(?m)^([\w.-]+==.*?) *\\$", text)]
    return [one.name for one in found if one.marker is None or one.marker.evaluate()]


def test_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    install = ("install", "--no-deps", "--no-index", "--no-cache-dir")
    run(*PIP, "--python", binaries / "python", *install, wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    for name in locked():
        files = distribution(name).files
        assert files, name
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    run(*PIP, "--python", binaries / "python", "check", cwd=tmp_path)

    assert __version__ in run(binaries / "clusterproxy", "--version", cwd=tmp_path)
    for command in ("bench", "completion", "dial", "forward", "http-proxy", "socks", "status"):
        assert "Usage:" in run(binaries / "clusterproxy", command, "--help", cwd=tmp_path)
    for program in ("proxy-server", "proxy-agent"):
        assert "--admin-bind-address" in run(binaries / program, "--help", cwd=tmp_path)
    code = "import clusterproxy as c; c.open_tunnel; print(c.__file__)"
    assert str(packages) in run(binaries / "python", "-I", "-c", code, cwd=tmp_path)
