"""The field's fast ones, set up as a user would: OpenSSH's `-R` and rathole over TLS, each on loopback."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
from cryptography.x509 import load_pem_x509_certificate

from .processes import children
from .programs import NotMeasured, running, wait_open

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from .cases import Service

RATHOLE: Final = "0.5.0"
SSH_PORT, RATHOLE_PORT = 19590, 19600
CIPHER: Final = "aes128-gcm@openssh.com"


@attrs.frozen(kw_only=True)
class Tunnel:
    """A tunnel that carries services to ports of its own."""

    ports: Mapping[Service, int]
    pids: Mapping[str, Sequence[int]]


@contextmanager
def ssh(folder: Path, services: Mapping[Service, int]) -> Generator[Tunnel]:
    """Run an OpenSSH server, and a client that forwards ports of it to the services.

    Raises:
        NotMeasured: there is no OpenSSH, or it does not run here.
    """
    # The server insists on being named by its full path.
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if server is None or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        raise NotMeasured("ssh, sshd and ssh-keygen are needed")
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / f"ssh-{key}")]
        subprocess.run(command, check=True, capture_output=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = folder / "sshd.conf"
    config.write_text(
        f"Port {SSH_PORT}\nListenAddress 127.0.0.1\nHostKey {folder / 'ssh-host'}\n"
        f"AuthorizedKeysFile {folder / 'ssh-user.pub'}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"AllowTcpForwarding yes\nCiphers {CIPHER}\n"
    )
    ports = _own_ports(services, SSH_PORT)
    options = {
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "ExitOnForwardFailure": "yes",
        "IdentitiesOnly": "yes", "BatchMode": "yes", "Ciphers": CIPHER, "LogLevel": "ERROR",
    }  # fmt: skip
    client = ["ssh", "-N", "-F", "none", "-p", str(SSH_PORT), "-i", str(folder / "ssh-user")]
    client += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    client += [word for name, port in ports.items() for word in ("-R", f"127.0.0.1:{port}:127.0.0.1:{services[name]}")]
    client += [f"{getpass.getuser()}@127.0.0.1"]
    with running([server, "-D", "-e", "-f", str(config)], folder / "sshd.log") as daemon:
        wait_open([SSH_PORT], daemon, folder / "sshd.log")
        with running(client, folder / "ssh.log") as agent:
            wait_open(ports.values(), agent, folder / "ssh.log")
            sessions = children(daemon.pid)
            try:
                yield Tunnel(ports=ports, pids={"server": sessions, "agent": [agent.pid]})
            finally:
                # They outlive the server that has forked them, if only until they see the client gone.
                agent.kill()


@contextmanager
def rathole(folder: Path, services: Mapping[Service, int]) -> Generator[Tunnel]:
    """Run a rathole server and client over TLS; rathole is built first when it is not there.

    Raises:
        NotMeasured: it cannot be built or does not run here.
    """
    program = _rathole_program()
    token, password = secrets.token_hex(), secrets.token_hex()
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "rathole-ca.crt"))
    identity = pkcs12.serialize_key_and_certificates(
        b"rathole",
        load_pem_private_key(leaf.private_key_pem.bytes(), None),  # type: ignore[arg-type]  # of any kind, in its types
        load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()),
        None,
        BestAvailableEncryption(password.encode()),
    )
    (folder / "rathole.p12").write_bytes(identity)
    ports = _own_ports(services, RATHOLE_PORT)
    tls = {
        "server": f'pkcs12 = "{folder / "rathole.p12"}"\npkcs12_password = "{password}"\n',
        "client": f'trusted_root = "{folder / "rathole-ca.crt"}"\nhostname = "localhost"\n',
    }
    addresses = {"server": ("bind_addr", ports), "client": ("local_addr", services)}
    for side, (flag, of) in addresses.items():
        own = "bind_addr" if side == "server" else "remote_addr"
        text = f'[{side}]\n{own} = "127.0.0.1:{RATHOLE_PORT}"\ndefault_token = "{token}"\n'
        text += f'[{side}.transport]\ntype = "tls"\n[{side}.transport.tls]\n{tls[side]}'
        text += "".join(f'[{side}.services.{name}]\n{flag} = "127.0.0.1:{of[name]}"\n' for name in ports)
        (folder / f"rathole-{side}.toml").write_text(text)
    logs = {side: folder / f"rathole-{side}.log" for side in tls}
    with (
        running([program, "--server", str(folder / "rathole-server.toml")], logs["server"]) as server,
        running([program, "--client", str(folder / "rathole-client.toml")], logs["client"]) as agent,
    ):
        # The server listens for a service once the client has named it.
        wait_open(ports.values(), agent, logs["client"])
        yield Tunnel(ports=ports, pids={"server": [server.pid], "agent": [agent.pid]})


def _rathole_program() -> str:
    """Return rathole's path; it is built once for all checkouts, and takes minutes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = cache / "clusterproxy" / f"rathole-{RATHOLE}"
    program = root / "bin" / "rathole"
    if program.exists():
        return str(program)
    if not shutil.which("cargo"):
        raise NotMeasured("cargo, to build rathole, is missing")
    print(f"Building rathole {RATHOLE} into {root}, once; this takes minutes ...", file=sys.stderr, flush=True)
    # Its own lock file names crates that current compilers refuse.
    command = ["cargo", "install", "rathole", "--version", RATHOLE, "--root", str(root)]
    command += ["--no-default-features", "--features", "server,client,tls"]
    if subprocess.run(command, check=False).returncode != 0:
        raise NotMeasured(f"rathole {RATHOLE} could not be built, see above")
    return str(program)


def _own_ports(services: Mapping[Service, int], base: int) -> dict[Service, int]:
    return {name: base + 1 + number for number, name in enumerate(services)}
