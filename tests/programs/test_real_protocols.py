"""Protocols in which the service speaks first, or one side ends early: real programs through real programs.

What they need is in Debian: openssh-server, openssh-client, postgresql, netcat-openbsd.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import attrs
import pytest
from cluster import LOOPBACK, PROGRAM, Cluster, service, wait_until

if TYPE_CHECKING:
    from collections.abc import Generator

pytestmark = pytest.mark.programs

PATIENCE_S: Final = 30.0
MIB: Final = 1024 * 1024
FIRST_PORT: Final = 27320
LARGE_PORT: Final = 27330
SSHD_PORT: Final = 27326
POSTGRES_PORT: Final = 27327

SSHD: Final = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NC: Final = shutil.which("nc.openbsd")
INITDB: Final = shutil.which("initdb") or next(
    map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None
)

needs_ssh = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="needs Debian's openssh-server and openssh-client",
)
needs_postgres = pytest.mark.skipif(
    INITDB is None or shutil.which("psql") is None, reason="needs Debian's postgresql"
)
needs_nc = pytest.mark.skipif(NC is None, reason="needs Debian's netcat-openbsd")


@pytest.fixture(scope="module", params=["grpc", "http-connect"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), FIRST_PORT, request.param)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=5):
        return True
    return False


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def send_and_close(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(data)
    pipe.close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- ssh -------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Ssh:
    """A running sshd, and what its clients need."""

    port: int
    options: tuple[str, ...]

    @contextlib.contextmanager
    def through(self, cluster: Cluster, way: str) -> Generator[tuple[str, ...]]:
        """Options with which ssh and scp come through the tunnel."""
        if way == "dial":
            command = f"ProxyCommand={shlex.join(PROGRAM)} dial %h:%p"
            yield (*self.options, "-o", command, "-o", f"Port={self.port}")
            return
        with cluster.listener("forward", f"{LOOPBACK}:{self.port}") as forward:
            yield (*self.options, "-o", f"Port={forward.port()}")


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Ssh]:
    """Run sshd for the user who runs the tests."""
    assert SSHD is not None
    directory = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(
            ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)), check=True
        )
    (directory / "known_hosts").write_text(f"service {(directory / 'host.pub').read_text()}")
    (directory / "sshd_config").write_text(
        f"""ListenAddress {LOOPBACK}:{SSHD_PORT}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
Subsystem sftp internal-sftp
"""
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # as its init script does
    with (directory / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen(
            (SSHD, "-D", "-e", "-f", str(directory / "sshd_config")), stderr=log
        )
    try:
        wait_until(lambda: accepts(SSHD_PORT), "sshd listens")
        settings = {
            "User": pwd.getpwuid(os.geteuid()).pw_name,
            "IdentityFile": f"{directory}/user",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": f"{directory}/known_hosts",
            "HostKeyAlias": "service",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
        }
        options = ("-F", "/dev/null", *(f"-o{name}={value}" for name, value in settings.items()))
        yield Ssh(port=SSHD_PORT, options=options)
    finally:
        sshd.terminate()
        sshd.wait()


def run_ssh(
    cluster: Cluster, *command: str, send: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command,
        input=send,
        env=cluster.environment,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stderr == b""
    return done


@needs_ssh
@pytest.mark.parametrize("way", ["forward", "dial"])
def test_ssh_with_input_that_ends(cluster: Cluster, ssh: Ssh, way: str) -> None:
    data = os.urandom(8 * MIB)
    with ssh.through(cluster, way) as options:
        done = run_ssh(cluster, "ssh", *options, LOOPBACK, "cat | sha256sum", send=data)
        assert (done.returncode, done.stdout.split()) == (0, [sha256(data).encode(), b"-"])
        done = run_ssh(cluster, "ssh", *options, LOOPBACK, "cat; exit 7", send=data)
        assert (done.returncode, sha256(done.stdout)) == (7, sha256(data))


@needs_ssh
@pytest.mark.parametrize("way", ["forward", "dial"])
def test_scp_there_and_back(cluster: Cluster, ssh: Ssh, way: str, tmp_path: Path) -> None:
    data = os.urandom(8 * MIB)
    (tmp_path / "here").write_bytes(data)
    with ssh.through(cluster, way) as options:
        there = f"{LOOPBACK}:{tmp_path}/there"
        for ends in ((f"{tmp_path}/here", there), (there, f"{tmp_path}/back")):
            assert run_ssh(cluster, "scp", "-q", *options, *ends).returncode == 0
    for name in ("there", "back"):
        assert sha256((tmp_path / name).read_bytes()) == sha256(data)


# -- PostgreSQL ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Generator[str]:
    """Run a database server as somebody who is not root, which it insists on; return its address."""
    assert INITDB is not None
    user: str | int = "postgres" if os.geteuid() == 0 else os.geteuid()
    group: str | int = "postgres" if os.geteuid() == 0 else os.getegid()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        shutil.chown(name, user, group)
        subprocess.run(
            (INITDB, "--no-sync", "--auth=trust", "--username=postgres", "--locale=C", f"{name}/d"),
            user=user,
            group=group,
            cwd=name,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        with Path(name, "log").open("wb") as log:
            server = subprocess.Popen(
                (
                    str(Path(INITDB).with_name("postgres")),
                    f"-D{name}/d",
                    f"-p{POSTGRES_PORT}",
                    "-F",
                    f"-clisten_addresses={LOOPBACK}",
                    "-cunix_socket_directories=",
                ),
                user=user,
                group=group,
                cwd=name,
                stdout=log,
                stderr=log,
            )
        try:
            probe = ("psql", f"host={LOOPBACK} port={POSTGRES_PORT} user=postgres", "-Xqc", "")
            wait_until(
                lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0,
                "PostgreSQL answers",
            )
            yield f"{LOOPBACK}:{POSTGRES_PORT}"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            server.wait()


def psql(where: str, *commands: str) -> list[str]:
    return [
        "psql",
        f"{where} user=postgres dbname=postgres",
        "-XqAt",
        "-vON_ERROR_STOP=1",
        *(f"-c{command}" for command in commands),
    ]


def query(where: str, *commands: str) -> str:
    done = subprocess.run(
        psql(where, *commands), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_postgres
def test_psql_copies_there_and_back(cluster: Cluster, postgres: str, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_text("".join(f"{n}\t{os.urandom(64).hex()}\n" for n in range(40_000)))
    with cluster.listener("forward", postgres) as forward:
        output = query(
            f"host={LOOPBACK} port={forward.port()}",
            "create temp table t (n int, x text)",
            f"\\copy t from {there}",
            "select count(*), sum(length(x)) from t",
            f"\\copy (table t order by n) to {back}",
        )
    assert output == "40000|5120000\n"
    assert sha256(back.read_bytes()) == sha256(there.read_bytes())


@needs_postgres
def test_psql_by_a_unix_socket_and_a_query_that_is_cancelled(
    cluster: Cluster, postgres: str, tmp_path: Path
) -> None:
    """For that psql dials once more, and waits for the server to hang up."""
    where = f"host={tmp_path} port=5432"
    with cluster.listener("forward", f"{postgres}=unix:{tmp_path}/.s.PGSQL.5432") as forward:
        assert forward.address().startswith("unix:")
        sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)'"
        sleeping += " and state = 'active'"
        with subprocess.Popen(
            psql(where, "select pg_sleep(600)"), stderr=subprocess.PIPE, text=True
        ) as sleeper:
            try:
                wait_until(lambda: query(where, sleeping) == "1\n", "the query runs")
                sleeper.send_signal(signal.SIGINT)
                _, complaint = sleeper.communicate(timeout=PATIENCE_S)
            finally:
                sleeper.kill()
        assert "ERROR:  canceling statement due to user request\n" in complaint
        assert query(where, sleeping) == "0\n"


# -- netcat ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def nc_service() -> Generator[tuple[subprocess.Popen[bytes], str]]:
    """Run an nc that serves one connection, and passes the end of its input on; with its address."""
    assert NC is not None
    with subprocess.Popen(
        (NC, "-nvlN", LOOPBACK, "0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as nc:
        try:
            assert nc.stderr is not None
            line = nc.stderr.readline().split()
            assert line[:-1] == [b"Listening", b"on", LOOPBACK.encode()]
            yield nc, f"{LOOPBACK}:{int(line[-1])}"
            assert nc.wait(timeout=PATIENCE_S) == 0
        finally:
            nc.kill()


@needs_nc
def test_nc_ends_its_request_and_gets_the_whole_answer(cluster: Cluster) -> None:
    assert NC is not None
    data = os.urandom(8 * MIB)
    with service("reverse") as address, cluster.listener("forward", address) as forward:
        done = subprocess.run(
            (NC, "-N", LOOPBACK, str(forward.port())),
            input=data,
            capture_output=True,
            timeout=PATIENCE_S,
            check=True,
        )
    assert done.stderr == b""
    assert sha256(done.stdout) == sha256(data[::-1])


@needs_nc
def test_a_service_that_speaks_first_and_ends_its_side(cluster: Cluster) -> None:
    greeting, data = os.urandom(MIB), os.urandom(8 * MIB)
    with (
        nc_service() as (nc, address),
        cluster.listener("forward", address) as forward,
        socket.create_connection((LOOPBACK, forward.port()), timeout=PATIENCE_S) as sock,
    ):
        assert nc.stdin is not None
        assert nc.stdout is not None
        nc.stdin.write(greeting)
        nc.stdin.close()
        with sock.makefile("rb") as received:
            assert sha256(received.read()) == sha256(greeting)
        # Only now, when that direction has ended.
        sender = threading.Thread(target=send_and_end, args=(sock, data))
        sender.start()
        assert sha256(nc.stdout.read()) == sha256(data)
        sender.join()


@needs_nc
def test_a_service_that_speaks_first_and_waits_for_the_end_of_the_request(cluster: Cluster) -> None:
    """By ``dial``; this nc ends when the other side has ended, and not before."""
    greeting, request = os.urandom(MIB), os.urandom(8 * MIB)
    with (
        nc_service() as (nc, address),
        subprocess.Popen(
            (*PROGRAM, "dial", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=cluster.environment,
        ) as dial,
    ):
        try:
            assert nc.stdin is not None
            assert nc.stdout is not None
            assert dial.stdin is not None
            assert dial.stdout is not None
            assert dial.stderr is not None
            nc.stdin.write(greeting)
            nc.stdin.flush()
            assert sha256(dial.stdout.read(len(greeting))) == sha256(greeting)
            sender = threading.Thread(target=send_and_close, args=(dial.stdin, request))
            sender.start()
            assert sha256(nc.stdout.read()) == sha256(request)
            sender.join()
            assert dial.wait(timeout=PATIENCE_S) == 0
            assert (dial.stdout.read(), dial.stderr.read()) == (b"", b"")
        finally:
            dial.kill()


# -- much ------------------------------------------------------------------------------------------


def peak_rss_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_a_gibibyte_there_and_back(tmp_path: Path) -> None:
    """Through ``forward``, server and agent to an echo, without anybody keeping it in memory."""
    # Each MiB is another part of it, so that nothing can be lost, doubled or swapped unnoticed.
    block = memoryview(os.urandom(3 * MIB))
    sent, received, size = hashlib.sha256(), hashlib.sha256(), 0
    cluster = Cluster(tmp_path, LARGE_PORT)
    try:
        cluster.start_server()
        cluster.start_agent()
        with (
            service("echo") as address,
            cluster.listener("forward", address) as forward,
            socket.create_connection((LOOPBACK, forward.port()), timeout=PATIENCE_S) as sock,
        ):

            def send() -> None:
                for number in range(1024):
                    part = block[number * 2003 : number * 2003 + MIB]
                    sent.update(part)
                    sock.sendall(part)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            began = time.monotonic()
            sender.start()
            buffer = bytearray(MIB)
            while count := sock.recv_into(buffer):
                received.update(memoryview(buffer)[:count])
                size += count
            sender.join()
            took_s = time.monotonic() - began
            pids = {name: cluster.pid(name) for name in ("server", "agent")}
            pids["forward"] = forward.process.pid
            peaks = {name: peak_rss_mib(pid) for name, pid in pids.items()}
    finally:
        cluster.close()
    assert size == 1024 * MIB
    assert received.digest() == sent.digest()
    assert took_s < 60
    assert max(peaks.values()) < 200, peaks
