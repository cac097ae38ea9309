"""The Go original in the world: its release by Helm, its programs in containers of its image, its manager's part played."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Final

from go_tools import go_tool
from kube.addon_installation import AGENT
from kube.control_plane import eventually
from kube.go_installation import GoAuthority
from kube.go_manager import GoManager
from kube.migration import ORIGINAL_IMAGE, OUR_IMAGE, SERVER, all_have, original_release

from e2e.cluster import HUB_PROXY
from e2e.network import write_program
from e2e.world import AGENTS, CLUSTERS, NAMESPACE

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.world import World

Object = dict[str, Any]

IMAGES: Final = {"the Go original's": ORIGINAL_IMAGE, "ours": OUR_IMAGE}


class Original:
    """The original's installation. Whatever is not the original's own program is ours in its containers, too.

    Args:
      folder: for programs, not on the file system of the root.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        folder.mkdir()
        for name, tool in (("proxy-server", "server"), ("proxy-agent", "agent")):
            shutil.copy(go_tool(tool), folder / name)
        # It cannot be had: what it does is done by GoManager.
        write_program(folder / "manager", "#!/bin/sh\nexec sleep infinity\n")
        world.programs.have(ORIGINAL_IMAGE, folder)
        authority = GoAuthority.make()
        self.managers = [
            GoManager(world.hub.plane, NAMESPACE, name, HUB_PROXY, authority) for name in CLUSTERS
        ]

    def chart(self) -> None:
        """Write its chart to the operator's folder ``original``."""
        original_release(self._world.operator.station.directory / "original", HUB_PROXY)

    def first_steps(self) -> None:
        """Do what its manager does after its installation."""
        for each in self.managers:
            each.start()
        self.managers[0].make_hub()
        self._world.connect_clusters()
        for each in self.managers:
            eventually(lambda m=each: m.has_addon, "the cluster has the add-on")  # type: ignore[misc]
            each.register()
            each.write_work()

    def steps_back(self) -> None:
        """Do what it does when it finds the servers and agents of another manager, which has ended."""
        eventually(lambda: not self._others_manage(), "the other manager has ended", within_s=60)
        for each in self.managers:
            each.start()
        self.managers[0].write_deployment()
        for each in self.managers:
            each.write_work()

    def _others_manage(self) -> bool:
        pods = self._world.hub.plane.list("v1", "Pod", NAMESPACE, "component=cluster-proxy-manager")
        return any(pod["spec"]["containers"][0]["image"] != ORIGINAL_IMAGE for pod in pods)

    def requests(self) -> set[str]:
        """Return the names of all requests that agents have made for certificates."""
        return {
            request["metadata"]["name"] for each in self.managers for request in each.requests()
        }

    # -- whose programs run ------------------------------------------------------------------------

    def servers_are(self, whose: str) -> bool:
        """Whether all proxy servers are of an image of :data:`IMAGES`, and ready."""
        return all_have(self._world.hub.plane, NAMESPACE, SERVER, "proxy-server", IMAGES[whose])

    def agents_are(self, whose: str) -> bool:
        """Likewise, of the proxy agents of both clusters."""
        return all(
            all_have(each.plane, AGENTS, AGENT, "proxy-agent", IMAGES[whose])
            for each in self._world.managed.values()
        )
