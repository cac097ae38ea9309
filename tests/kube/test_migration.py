"""From the original to ours and back, on an installation with a managed cluster, under load."""

from __future__ import annotations

import base64
import logging
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from cryptography import x509
from helm_programs import helm_environment, helm_program, needs_helm

from kube.addon_installation import OF_TUNNEL
from kube.control_plane import eventually
from kube.installation import RBAC
from kube.migration import (
    AGENTS,
    CLUSTER,
    COPY_MIB,
    ORIGINAL_IMAGE,
    OUR_IMAGE,
    SERVER,
    command,
    original_installed,
    remove_pods,
)
from kube.test_hub_chart import NAMESPACE, ROLE, Hub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from kube.control_plane import ControlPlane
    from kube.migration import Migration
    from kube.ocm_hub import OcmHub

# Ten minutes: `make test-migration`, not `make test`.
pytestmark = [pytest.mark.kube, pytest.mark.migration, needs_helm, pytest.mark.timeout(420)]

_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def namespace(ocm_hub: OcmHub) -> Iterator[None]:
    """Remove what other tests' managers share, and the namespace when all is over."""
    plane = ocm_hub.plane
    if (shared := plane.get(RBAC, "ClusterRole", ROLE)) is not None:
        plane.delete({"apiVersion": RBAC, "kind": "ClusterRole", **shared})
    yield
    if (found := plane.get("v1", "Namespace", NAMESPACE)) is not None:
        remove_pods(plane, NAMESPACE)
        plane.delete({"apiVersion": "v1", "kind": "Namespace", **found})
        eventually(lambda: plane.get("v1", "Namespace", NAMESPACE) is None, "it is gone")


@pytest.fixture
def release(ocm_hub: OcmHub, namespace: None, tmp_path: Path) -> Iterator[Hub]:
    found = Hub(ocm_hub.plane, tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "helm").symlink_to(helm_program())
    found.environment["PATH"] = f"{programs}:{found.environment['PATH']}"
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
async def migration(
    ocm_hub: OcmHub, managed: ControlPlane, release: Hub, tmp_path: Path
) -> AsyncIterator[Migration]:
    async with original_installed(ocm_hub, managed, release, tmp_path) as found:
        found.write_values()
        yield found


def steps(migration: Migration) -> Callable[..., Awaitable[str]]:
    """Return what runs the document's steps, with what its first one finds out."""
    given = {"NS": NAMESPACE, "OLD_IMAGE": ORIGINAL_IMAGE, "OLD_REVISION": "1"}
    return partial(migration.run, **given)


async def in_order(migration: Migration, what: str) -> None:
    """Whatever has just been done: all works, and nothing was registered or signed anew."""
    await migration.until_dials_work()
    await migration.steady()
    await trio.to_thread.run_sync(migration.assert_nothing_is_new)
    _log.info(await trio.to_thread.run_sync(migration.tell, what))


async def go_back(migration: Migration) -> None:
    """Back to the original by Helm, whose manager then does what it does when it comes back."""
    in_thread = trio.to_thread.run_sync
    open_now = migration.load.tried
    await steps(migration)("go back")
    await migration.until(lambda: not migration.ours_manages(), "our manager is gone")
    await in_thread(migration.go.start)
    await in_thread(migration.go.write_deployment)
    await in_thread(migration.go.write_work)
    await migration.until_servers_are(ORIGINAL_IMAGE)
    await migration.until_agents_are(ORIGINAL_IMAGE)
    # There was no server for some seconds: the original's Deployment ends the old ones first.
    await in_order(migration, "back")
    # A later one may have gone through an agent of the original's that came to a server of ours in its last seconds.
    assert [why for number, why in migration.load.cut if number <= open_now] == []


async def test_server_first_without_a_failed_dial(migration: Migration) -> None:
    run = steps(migration)
    said = await run("what is there")
    assert said.splitlines()[-1] == f"{NAMESPACE} {ORIGINAL_IMAGE} 1"
    await run("stop the manager")
    await run("let the old servers go")
    await run("upgrade the hub")
    await run("end the old servers")
    await migration.until_servers_are(OUR_IMAGE)
    await in_order(migration, "server first")
    await run("upgrade the agents")
    await migration.until_agents_are(OUR_IMAGE)
    await in_order(migration, "then agents")
    await run("clean up")
    await migration.until_servers_are(OUR_IMAGE)
    await in_order(migration, "cleaned up")
    assert migration.load.failures == []
    assert migration.load.cut == []
    assert migration.load.refused == []
    assert migration.load.copies * COPY_MIB >= 1024
    await go_back(migration)


async def test_server_first_at_once(migration: Migration) -> None:
    run = steps(migration)
    await run("stop the manager")
    await run("upgrade the hub")
    await migration.until_servers_are(OUR_IMAGE)
    # What was on its way to an old server that did not listen any more has failed.
    await in_order(migration, "server first, at once")
    assert migration.load.cut == []


async def test_agents_first(migration: Migration) -> None:
    run, in_thread = steps(migration), trio.to_thread.run_sync
    await run("upgrade the agents by the original")
    # Its manager writes both then; the servers' pods stay.
    pods = migration.server_pods()
    await in_thread(migration.go.write_deployment)
    await in_thread(migration.go.write_work)
    await migration.until_agents_are(OUR_IMAGE)
    await in_order(migration, "agents first")
    assert migration.load.failures == []
    assert migration.server_pods() == pods
    await run("stop the manager")
    await run("let the old servers go")
    await run("upgrade hub and agents")
    await run("end the old servers")
    await migration.until_servers_are(OUR_IMAGE)
    await migration.until_agents_are(OUR_IMAGE)
    await in_order(migration, "then server")
    assert migration.load.failures == []
    assert migration.load.cut == []
    assert migration.load.refused == []
    await go_back(migration)


async def test_mixed_states(managed: ControlPlane, migration: Migration) -> None:
    run, in_thread = steps(migration), trio.to_thread.run_sync
    # The original's manager with our server, under its own Deployment.
    await run("upgrade the servers by the original")
    await in_thread(migration.go.write_deployment)
    await migration.until_servers_are(OUR_IMAGE)
    await in_order(migration, "the original's manager, our servers, old agents")

    # Our manager, with servers and agents of the original's.
    await run("stop the manager")
    await in_thread(migration.patch_server_image, ORIGINAL_IMAGE)
    await run("upgrade the manager only")
    await migration.until(migration.ours_manages, "our manager is there")
    await migration.until_servers_are(ORIGINAL_IMAGE)
    await migration.until_agents_are(ORIGINAL_IMAGE)
    deployment = migration.plane.get("apps/v1", "Deployment", SERVER, NAMESPACE)
    assert deployment is not None
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    await in_order(migration, "our manager, old servers, old agents")

    # An old agent gets its next certificate from our manager, which says of which cluster it is.
    before = {each["metadata"]["name"] for each in migration.go.requests()}
    secret = managed.get("v1", "Secret", OF_TUNNEL, AGENTS)
    assert secret is not None
    managed.delete({"apiVersion": "v1", "kind": "Secret", **secret})
    await migration.until(lambda: restarts(managed) == 1, "the old agent reads its new certificate")
    await migration.until_dials_work()
    await migration.steady()
    [asked] = [each for each in migration.go.requests() if each["metadata"]["name"] not in before]
    leaf = x509.load_pem_x509_certificate(base64.b64decode(asked["status"]["certificate"]))
    authority = migration.go.authority.certificate
    assert leaf.issuer == authority.subject
    leaf.verify_directly_issued_by(authority)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    [uri] = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uri.endswith(CLUSTER)


def restarts(managed: ControlPlane) -> int:
    """How often the proxy agent was started anew in its pod."""
    [pod] = managed.list("v1", "Pod", AGENTS)
    statuses = pod["status"]["containerStatuses"]
    [found] = [each["restartCount"] for each in statuses if each["name"] == "proxy-agent"]
    count: int = found
    return count


def test_the_document_lets_services_pass_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("registry: r.example\n")
    commands = command("let services pass").replace("helm upgrade", "helm template")
    done = subprocess.run(
        ("/bin/bash", "-euc", commands.replace("helm ", f"{helm_program()} ")),
        cwd=tmp_path,
        env=helm_environment(tmp_path / "helm", NS=NAMESPACE),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--exposed-services-mode=warn" in done.stdout
