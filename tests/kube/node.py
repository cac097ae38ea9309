"""The node of a :class:`kube.process_kubelet.ProcessKubelet`: its object, and the port that the apiserver calls.

With it ``kubectl logs``, ``exec``, ``attach``, ``port-forward`` and ``cp`` find the pods. A container's ``stdin: true`` is
played (it reads no end), terminals are for ``exec`` only. Logs have no times, so that what asks for them is refused.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final, Self

from kube.build import kubeletd_program

if TYPE_CHECKING:
    from kube.control_plane import Object
    from kube.process_kubelet import ProcessKubelet

_ADDRESS: Final = "127.0.0.1"

WEBSOCKETS: Final = "ExtendWebSocketsToKubelet"
"""The feature that a node declares to get ``kubectl``'s WebSockets as they are.

Without it the apiserver makes SPDY of them, as it does for kubelets before 1.36.
"""


class Node:
    """Serves the pods of a kubelet while its block lasts.

    Args:
      features: what it declares in ``status.declaredFeatures``; a kubelet of 1.36 has :data:`WEBSOCKETS`.

    Attributes:
      port: where kubeletd listens.
    """

    port: int

    def __init__(self, kubelet: ProcessKubelet, features: tuple[str, ...] = (WEBSOCKETS,)) -> None:
        self._kubelet = kubelet
        self._features = features
        self._process: subprocess.Popen[bytes]

    @property
    def _object(self) -> Object:
        return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._kubelet.node}}

    @property
    def pid(self) -> int:
        """The process of kubeletd."""
        return self._process.pid

    def __enter__(self) -> Self:
        plane, pods = self._kubelet.plane, self._kubelet.directory
        program = kubeletd_program()
        pods.mkdir(parents=True, exist_ok=True)
        with (pods / "kubeletd.log").open("ab") as log:
            # It ends with its stdin, so also when this process is killed.
            self._process = subprocess.Popen(
                (
                    program,
                    f"-address={_ADDRESS}:0",
                    f"-pods={pods}",
                    f"-cert={plane.directory / 'kubelet.crt'}",
                    f"-key={plane.directory / 'kubelet.key'}",
                    f"-client-ca={plane.ca}",
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line, f"kubeletd has ended: {(pods / 'kubeletd.log').read_text()}"
            self.port = int(line)
            plane.apply(self._object)
            plane.apply(
                {
                    **self._object,
                    "status": {
                        "addresses": [{"type": "InternalIP", "address": _ADDRESS}],
                        "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}},
                        "declaredFeatures": list(self._features),
                    },
                },
                subresource="status",
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._kubelet.plane.delete(self._object)

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
