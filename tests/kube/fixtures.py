"""The control planes that tests share, started when the first one needs them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
from typing import TYPE_CHECKING, Final

import pytest

from kube.build import cache_folder
from kube.control_plane import Addresses, ControlPlane
from kube.crds import custom_resource_definitions, ocm_definitions

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from kube.control_plane import Object
    from kube.ocm_hub import OcmHub

_NEED_KUBERNETES: Final = {"hub", "managed", "ocm_hub"}
_SLOTS: Final = 8
_numbers: Final = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a control plane, so that no such test is in the fast ones by mistake, and let it come last.

    Others count this process's own threads and sockets, and what acts on a control plane for all of its tests has some.
    """
    for item in items:
        if _NEED_KUBERNETES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kube)
    items.sort(key=lambda item: item.get_closest_marker("kube") is not None)


@pytest.fixture(scope="session")
def kube_slot() -> Iterator[int]:
    """A number that no other test run on this machine has now: ports and addresses are counted from it."""
    for slot in range(_SLOTS):
        with (cache_folder() / f"kube-slot-{slot}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    pytest.fail(f"{_SLOTS} test runs have control planes on this machine already")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, kube_slot: int) -> Iterator[ControlPlane]:
    """A hub, with the custom resources of Open Cluster Management."""
    addresses = Addresses(
        apiserver=16443 + kube_slot,
        controller_manager=16257 + kube_slot,
        etcd=12379 + 20 * kube_slot,
        etcd_peer=12380 + 20 * kube_slot,
        pods=f"127.{kube_slot}.1",
        services=f"127.{kube_slot}.101",
    )
    definitions = custom_resource_definitions()
    with _running("hub", tmp_path_factory, addresses, definitions) as plane:
        yield plane


@pytest.fixture(scope="session")
def managed(tmp_path_factory: pytest.TempPathFactory, kube_slot: int) -> Iterator[ControlPlane]:
    """A managed cluster."""
    addresses = Addresses(
        apiserver=17443 + kube_slot,
        controller_manager=17257 + kube_slot,
        etcd=12389 + 20 * kube_slot,
        etcd_peer=12390 + 20 * kube_slot,
        pods=f"127.{kube_slot}.2",
        services=f"127.{kube_slot}.102",
    )
    with _running("managed", tmp_path_factory, addresses, ()) as plane:
        yield plane


@pytest.fixture(scope="session")
def ocm_hub(tmp_path_factory: pytest.TempPathFactory, kube_slot: int) -> Iterator[OcmHub]:
    """A hub with Open Cluster Management's programs, which act on all that they find there.

    So it is not that of the other tests, which have objects of OCM that nobody shall touch. And its definitions are
    OCM's own, which store what is older.
    """
    # Imports the client of Kubernetes, which is more than all other tests' collection takes.
    from kube.ocm_hub import OcmHub, Webhook

    addresses = Addresses(
        apiserver=18443 + kube_slot,
        controller_manager=18257 + kube_slot,
        etcd=13379 + 20 * kube_slot,
        etcd_peer=13380 + 20 * kube_slot,
        pods=f"127.{kube_slot}.3",
        services=f"127.{kube_slot}.103",
    )
    webhook = Webhook(19443 + kube_slot, tmp_path_factory.mktemp("ocm-webhook"))
    definitions = ocm_definitions(webhook.url, webhook.ca)
    with (
        _running("ocm-hub", tmp_path_factory, addresses, definitions) as plane,
        OcmHub(plane, webhook) as found,
    ):
        yield found


@pytest.fixture
def accepted_cluster(ocm_hub: OcmHub) -> Iterator[str]:
    """A cluster that the hub has accepted, without a klusterlet."""
    name = f"cluster{next(_numbers)}"
    ocm_hub.accept(name)
    yield name
    ocm_hub.remove(name)


@contextlib.contextmanager
def _running(
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    addresses: Addresses,
    definitions: Sequence[Object],
) -> Generator[ControlPlane]:
    plane = ControlPlane(name, tmp_path_factory.mktemp(name), addresses)
    try:
        plane.start(definitions)
        yield plane
    finally:
        plane.close()
