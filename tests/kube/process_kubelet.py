"""A kubelet for tests: runs the pods of a namespace as local processes.

The pods come from the real Deployment and ReplicaSet controllers, and what they tell about themselves goes back there.
There is no scheduler: a pod without a node gets this one. What a container would see under a mount's path is in a
folder, and its arguments and variables are changed to name that; only the service account's token is where programs look
for it, in a mount namespace of the process (which needs root, or user namespaces). With a :class:`Sandbox` for each pod
nothing is changed: the container's command sees its mounts at their paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any, Final, Protocol

import httpx
import trio

from kube.background import Background
from kube.containers import Command, Container, command_line, now
from kube.mirror import MERGE, Calls, Mirror
from kube.volumes import NotThereError, contents, expanded, moved, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from kube.control_plane import ControlPlane

Object = dict[str, Any]

PROXY_SERVER_BINDS: Final = tuple(
    f"--{port}-bind-address={{pod_ip}}" for port in ("server", "agent", "health", "admin")
)
"""Arguments for :class:`Command` by which a proxy server listens on its pod's address only; the last flag wins."""

_ACCOUNT_FOLDER: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_SHOW_ACCOUNT: Final = (
    'mount -t tmpfs tmpfs /run && mkdir -p "$1" && mount --bind "$0" "$1" && shift && exec "$@"'
)


class Sandbox(Protocol):
    """Where the containers of one pod run.

    Attributes:
      address: the pod's.
      variables: what all containers find in their environment.
    """

    address: str
    variables: Mapping[str, str]

    def enter(self, container: Object, mounts: Mapping[str, Path]) -> tuple[str, ...]:
        """Return what is put before the commands of a container, which has folders mounted at paths."""

    def join(self, pid: int) -> tuple[str, ...]:
        """Return what is put before a command that is to run beside a container's process."""

    def close(self) -> None:
        """Remove it, after the end of all containers."""


class ProcessKubelet(Background):
    """Runs the pods of a namespace while its block lasts, in a thread of its own.

    Args:
      commands: what is run, by the first word of a container's command, or by its image if it has no command.
      directory: of the pods: volumes, and one log a container; and of each a file for kubeletd/, see :mod:`kube.node`.
      sandbox: makes a pod's sandbox; *commands* are not used then.
    """

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        commands: Mapping[str, Command],
        directory: Path,
        *,
        sandbox: Callable[[Object], Sandbox] | None = None,
    ) -> None:
        super().__init__()
        self.sandbox = sandbox
        self.plane = plane
        self.namespace = namespace
        self.commands = commands
        self.directory = directory
        self.node = f"node-of-{namespace}"
        self.pods: Mirror
        self.secrets: Mirror
        self.config_maps: Mirror
        self.calls: Calls
        self.probes: httpx.AsyncClient
        self._running: dict[str, _Pod] = {}

    def commands_of(self, image: str) -> Mapping[str, Command]:
        """Return what is run in containers of an image; for subclasses, here it is the same for all."""
        return self.commands

    def log(self, pod: str, container: str | None = None) -> str:
        """Return what the containers of a pod have written, or one of them."""
        pattern = f"{container or '*'}.log"
        return "".join(
            path.read_text(errors="replace")
            for path in sorted((self.directory / pod).glob(pattern))
        )

    def pids(self) -> list[int]:
        """Return the process ids of the containers that run now."""
        return [
            container.pid
            for pod in list(self._running.values())
            for container in pod.containers
            if container.pid
        ]

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with (
            Calls(self.plane) as self.calls,
            # A kubelet trusts whom it probes, too.
            httpx.AsyncClient(
                verify=False,  # noqa: S501
                limits=limits,
                timeout=60.0,
                trust_env=False,
            ) as self.probes,
        ):
            await self._run_pods(task_status)

    async def _run_pods(self, task_status: trio.TaskStatus[None]) -> None:
        self.pods, self.secrets, self.config_maps = (
            Mirror(self.calls, f"/api/v1/namespaces/{self.namespace}/{plural}")
            for plural in ("pods", "secrets", "configmaps")
        )
        async with trio.open_nursery() as nursery:
            for mirror in (self.pods, self.secrets, self.config_maps):
                await nursery.start(mirror.run)
            task_status.started()
            known: set[str] = set()
            while True:
                changed = self.pods.changed
                for pod in list(self.pods.items.values()):
                    if (uid := pod["metadata"]["uid"]) not in known:
                        known.add(uid)
                        nursery.start_soon(self._run_pod, uid, _Pod(self, pod))
                await changed.wait()

    async def _run_pod(self, uid: str, pod: _Pod) -> None:
        self._running[uid] = pod
        try:
            await pod.run()
        finally:
            del self._running[uid]
            pod.tell_of_end()
            if pod.sandbox is not None:
                pod.sandbox.close()


class _Pod:
    """A pod from its binding to its deletion."""

    def __init__(self, kubelet: ProcessKubelet, pod: Object) -> None:
        self.kubelet = kubelet
        self.name: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.spec: Object = pod["spec"]
        self.first = pod
        self.sandbox = None if kubelet.sandbox is None else kubelet.sandbox(pod)
        self.address = self.sandbox.address if self.sandbox else kubelet.plane.pod_address()
        self.folder: Path = kubelet.directory / self.name
        self.path = f"/api/v1/namespaces/{kubelet.namespace}/pods/{self.name}"
        self.containers: list[Container] = []
        self._tokens: dict[str, bytes] = {}
        self._dirty = trio.Event()
        self._since: dict[str, tuple[bool, str]] = {}
        self._began = now()
        self._waits_for = ""
        self._beside: dict[str, Object] = {}

    # -- life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        if self.spec.get("initContainers"):
            raise AssertionError(f"{self.name}: init containers are not played yet")
        if not self.spec.get("nodeName"):
            await self._bind()
        self.folder.mkdir(parents=True, exist_ok=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            async with trio.open_nursery() as work:
                work.start_soon(self._work)
                grace_s = await self._until_deleted()
                if grace_s is not None:
                    async with trio.open_nursery() as stops:
                        for container in self.containers:
                            stops.start_soon(container.stop, grace_s)
                work.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        if self._current() is not None:
            await self.kubelet.calls.ask("DELETE", self.path, options)

    async def _bind(self) -> None:
        # Only a pod that has a node is deleted with grace.
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": self.name, "namespace": self.kubelet.namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.kubelet.node},
        }
        await self.kubelet.calls.ask("POST", f"{self.path}/binding", binding)

    async def _work(self) -> None:
        await self._make_tokens()
        await self._publish_volumes()
        self.containers = [self._container(spec) for spec in self.spec["containers"]]
        async with trio.open_nursery() as nursery:
            for container in self.containers:
                nursery.start_soon(container.run)
            while True:
                await self._objects_changed()
                await self._publish_volumes()

    async def _until_deleted(self) -> float | None:
        """Return the grace of its deletion, None if it is gone already."""
        while True:
            changed = self.kubelet.pods.changed
            pod = self._current()
            if pod is None:
                return None
            if "deletionTimestamp" in pod["metadata"]:
                grace: float = pod["metadata"].get("deletionGracePeriodSeconds", 30)
                return grace
            await changed.wait()

    def _current(self) -> Object | None:
        pod = self.kubelet.pods.items.get(self.name)
        return pod if pod is not None and pod["metadata"]["uid"] == self.uid else None

    # -- volumes -----------------------------------------------------------------------------------

    async def _publish_volumes(self) -> None:
        while (files := self._files()) is None:
            self._mark_dirty()
            await self._objects_changed()
        for name, content in files.items():
            publish(self._volume(name), content)

    def _files(self) -> dict[str, dict[str, bytes]] | None:
        """Return the files of the volumes; None if there are objects to wait for."""
        items = (self.kubelet.secrets.items, self.kubelet.config_maps.items)
        try:
            files = {
                volume["name"]: contents(volume, *items, self._tokens, self._fields())
                for volume in self.spec.get("volumes", [])
                # What a container has written into an empty folder stays there.
                if "emptyDir" not in volume or not self._volume(volume["name"]).exists()
            }
        except NotThereError as error:
            self._waits_for = str(error)
            return None
        self._waits_for = ""
        return files

    async def _objects_changed(self) -> None:
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            for mirror in (self.kubelet.secrets, self.kubelet.config_maps):
                nursery.start_soon(wait, mirror.changed)

    async def _make_tokens(self) -> None:
        account = self.spec["serviceAccountName"]
        path = f"/api/v1/namespaces/{self.kubelet.namespace}/serviceaccounts/{account}/token"
        bound = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        for volume in self.spec.get("volumes", []):
            for source in volume.get("projected", {}).get("sources", []):
                if wanted := source.get("serviceAccountToken"):
                    spec = {
                        "expirationSeconds": wanted.get("expirationSeconds", 3600),
                        "boundObjectRef": bound,
                    }
                    if "audience" in wanted:
                        spec["audiences"] = [wanted["audience"]]
                    answer = await self.kubelet.calls.ask("POST", path, {"spec": spec})
                    assert answer is not None, f"{self.name}: no service account {account}"
                    token: str = answer["status"]["token"]
                    self._tokens[f"{volume['name']}/{wanted['path']}"] = token.encode()

    def _volume(self, name: str) -> Path:
        return self.folder / "volumes" / name

    def _fields(self) -> dict[str, str]:
        meta = self.first["metadata"]
        fields = {
            "metadata.name": self.name,
            "metadata.namespace": self.kubelet.namespace,
            "metadata.uid": self.uid,
            "spec.nodeName": self.kubelet.node,
            "spec.serviceAccountName": self.spec.get("serviceAccountName", ""),
            "status.hostIP": "127.0.0.1",
            "status.podIP": self.address,
            "status.podIPs": self.address,
        }
        for kind in ("labels", "annotations"):
            for key, value in meta.get(kind, {}).items():
                fields[f"metadata.{kind}['{key}']"] = value
        return fields

    # -- containers --------------------------------------------------------------------------------

    def _container(self, spec: Object) -> Container:
        mounts: dict[str, Path] = {}
        for mount in spec.get("volumeMounts", []):
            folder = self._volume(mount["name"])
            mounts[mount["mountPath"].rstrip("/")] = (
                folder / mount["subPath"] if "subPath" in mount else folder
            )
        before: tuple[str, ...] = ()
        if self.sandbox is not None:
            before, mounts = self.sandbox.enter(spec, mounts), {}
        elif (token := mounts.pop(_ACCOUNT_FOLDER, None)) is not None:
            before = shows_account(token)
        variables = self._variables(spec, mounts)
        own = [*spec.get("command", [spec["image"]]), *spec.get("args", [])]
        log = self.folder / f"{spec['name']}.log"
        commands = self.kubelet.commands_of(spec["image"])
        stdin = self.folder / f"{spec['name']}.stdin" if spec.get("stdin") else None
        if stdin is not None and not stdin.exists():
            os.mkfifo(stdin)
        self._beside[spec["name"]] = {
            "log": str(log),
            "stdin": "" if stdin is None else str(stdin),
            "command": before,
            "programs": {name: command.program for name, command in commands.items()},
            "folder": str(self.folder),
            "environment": [f"{name}={value}" for name, value in variables.items()],
            "mounts": [(path, str(mounts[path])) for path in sorted(mounts, key=len, reverse=True)],
        }

        def launch(command: list[str] | None) -> subprocess.Popen[bytes]:
            words = [moved(expanded(word, variables), mounts) for word in command or own]
            line = (
                words
                if self.sandbox
                else command_line(words, commands, self.address, hook=command is not None)
            )
            with contextlib.ExitStack() as files:
                output = files.enter_context(log.open("ab"))
                # Who opens a FIFO for both does not wait, and never reads an end.
                mode, file = ("rb", os.devnull) if stdin is None else ("r+b", stdin)
                return subprocess.Popen(
                    ("setpriv", "--pdeathsig", "KILL", *before, *line),
                    cwd=self.folder,
                    env=variables,
                    stdin=files.enter_context(open(file, mode, buffering=0)),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )

        return Container(spec, self.address, launch, self._mark_dirty, self.kubelet.probes)

    def _variables(self, spec: Object, mounts: Mapping[str, Path]) -> dict[str, str]:
        apiserver = httpx.URL(self.kubelet.plane.server)
        variables = {
            "HOSTNAME": self.name,
            **(
                self.sandbox.variables
                if self.sandbox
                else {
                    # Of the test run only what programs need to start, and to be measured.
                    **_of_this_run(),
                    "HOME": str(self.folder),
                    "KUBERNETES_SERVICE_HOST": apiserver.host,
                    "KUBERNETES_SERVICE_PORT": str(apiserver.port),
                }
            ),
        }
        for variable in spec.get("env", []):
            if "valueFrom" in variable:
                value = self._value_from(variable["valueFrom"])
            else:
                value = moved(expanded(variable.get("value", ""), variables), mounts)
            variables[variable["name"]] = value
        return variables

    def _value_from(self, source: Object) -> str:
        if "fieldRef" in source:
            return self._fields()[source["fieldRef"]["fieldPath"]]
        for key, kind in (("secretKeyRef", "secret"), ("configMapKeyRef", "configMap")):
            if key in source:
                reference = {**source[key], "secretName": source[key]["name"]}
                wanted = reference["key"]
                volume = {
                    "name": "env",
                    kind: {**reference, "items": [{"key": wanted, "path": "v"}]},
                }
                items = (self.kubelet.secrets.items, self.kubelet.config_maps.items)
                return contents(volume, *items, {}, {}).get("v", b"").decode()
        raise AssertionError(f"no way to make the variable from {source}")

    # -- kubeletd ----------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Write what kubeletd/pods.go reads."""
        containers: dict[str, Object] = {}
        for container in self.containers:
            told_of = {"pid": container.pid, **self._beside[container.name]}
            if self.sandbox is not None:
                told_of |= {"command": self.sandbox.join(container.pid), "programs": {}}
            containers[container.name] = told_of
        told = {
            "uid": self.uid,
            "namespace": self.kubelet.namespace,
            "address": self.address,
            "containers": containers,
        }
        part = self._file().with_suffix(".part")
        part.write_text(json.dumps(told))
        part.rename(self._file())

    def tell_of_end(self) -> None:
        """Remove it, if it is not of another pod of the name already."""
        with contextlib.suppress(FileNotFoundError):
            if json.loads(self._file().read_text())["uid"] == self.uid:
                self._file().unlink()

    def _file(self) -> Path:
        return self.kubelet.directory / f"{self.name}.json"

    # -- status ------------------------------------------------------------------------------------

    def _mark_dirty(self) -> None:
        self._tell()
        self._dirty.set()

    async def _report(self) -> None:
        while True:
            self._dirty = trio.Event()
            status = self._status()
            await self.kubelet.calls.ask("PATCH", f"{self.path}/status", {"status": status}, MERGE)
            await self._dirty.wait()

    def _status(self) -> Object:
        running = bool(self.containers)
        ready = running and all(container.ready for container in self.containers)
        found = {
            "PodScheduled": True,
            "PodReadyToStartContainers": running,
            "Initialized": running,
            "ContainersReady": ready,
            "Ready": ready,
        }
        for kind, good in found.items():
            if self._since.get(kind, (None, ""))[0] is not good:
                self._since[kind] = (good, now())
        statuses = [container.status() for container in self.containers] or [
            {
                "name": spec["name"],
                "image": spec["image"],
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": {"waiting": {"reason": "ContainerCreating", "message": self._waits_for}},
            }
            for spec in self.spec["containers"]
        ]
        return {
            "phase": "Running" if running else "Pending",
            "startTime": self._began,
            "hostIP": "127.0.0.1",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "conditions": [
                _condition(k, good=good, since=t) for k, (good, t) in self._since.items()
            ],
            "containerStatuses": statuses,
        }


def _of_this_run() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if re.match(r"PATH$|LANG$|LC_|COVERAGE_", k)}


def _condition(kind: str, *, good: bool, since: str) -> Object:
    return {"type": kind, "status": str(good), "lastTransitionTime": since}


def shows_account(token: Path) -> tuple[str, ...]:
    """Return what is put before a command that finds the service account where programs look for it."""
    own_root = () if os.geteuid() == 0 else ("--map-root-user",)
    words = ("sh", "-c", _SHOW_ACCOUNT, str(token), _ACCOUNT_FOLDER)
    return ("unshare", "--mount", *own_root, "--", *words)
