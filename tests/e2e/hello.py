"""What runs in a managed cluster: a service, one with TLS, and a user who may look at one namespace."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final

import trustme
from kube.control_plane import eventually

if TYPE_CHECKING:
    from e2e.cluster import Cluster

Object = dict[str, Any]

#: The namespace in which the user may look at everything, and one in which not.
SPACE, OTHER_SPACE = "default", "kube-public"
_RBAC: Final = "rbac.authorization.k8s.io"
_RULES: Final = (
    {"apiGroups": [""], "resources": ["pods", "pods/log", "configmaps"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create", "get"]},
)  # fmt: skip
_SECURE: Final = """
import functools, http.server, ssl
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/www")
server = http.server.ThreadingHTTPServer(("", 8443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
"""


def populate(cluster: Cluster) -> None:
    """Deploy the services, and wait until they are ready."""
    plane = cluster.plane
    authority = trustme.CA()
    leaf = authority.issue_cert("hello-world-https.default.svc")
    tls = {
        "tls.crt": leaf.cert_chain_pems[0].bytes(),
        "tls.key": leaf.private_key_pem.bytes(),
    }
    plane.apply(
        _object(
            "v1",
            "ConfigMap",
            "www",
            data={
                "index.html": f"Hello from {cluster.name}\n",
                "ca.crt": authority.cert_pem.bytes().decode(),
            },
        ),
        _object(
            "v1",
            "Secret",
            "hello-tls",
            data={name: base64.b64encode(value).decode() for name, value in tls.items()},
        ),
        *deployed(
            "hello-world", 8000, ["python3", "-m", "http.server", "--directory", "/www", "8000"]
        ),
        *deployed("hello-world-https", 8443, ["python3", "-c", _SECURE]),
        _object("v1", "ServiceAccount", "reader"),
        _object("v1", "ServiceAccount", "delegate"),
        _object(f"{_RBAC}/v1", "Role", "reader", rules=list(_RULES)),
        _bound("Role", "reader", "reader"),
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "delegate"},
            "rules": [
                {"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}
            ],
        },
        _bound("ClusterRole", "delegate", "delegate"),
    )
    eventually(
        lambda: (
            len(
                [
                    each
                    for each in plane.list("apps/v1", "Deployment", SPACE)
                    if each.get("status", {}).get("readyReplicas") == 1
                ]
            )
            == 2
        ),
        f"the services of {cluster.name} are ready",
        within_s=60,
    )


def _object(api_version: str, kind: str, name: str, **fields: Any) -> Object:
    metadata = {"name": name, "namespace": SPACE}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def _bound(kind: str, role: str, account: str) -> Object:
    bound: Object = {
        "roleRef": {"apiGroup": _RBAC, "kind": kind, "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": SPACE}],
    }
    if kind == "Role":
        return _object(f"{_RBAC}/v1", "RoleBinding", role, **bound)
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": role},
        **bound,
    }


def deployed(name: str, port: int, command: list[str]) -> tuple[Object, Object]:
    """Return a Deployment and its Service."""
    labels = {"app": name}
    container = {
        "name": "main",
        "image": "hello",
        "command": command,
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"name": "web", "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": "web"}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "www", "mountPath": "/www"},
            {"name": "tls", "mountPath": "/tls"},
        ],
    }
    pod = {
        "containers": [container],
        "terminationGracePeriodSeconds": 1,
        "volumes": [
            {"name": "www", "configMap": {"name": "www"}},
            {"name": "tls", "secret": {"secretName": "hello-tls"}},
        ],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    return (
        _object(
            "apps/v1",
            "Deployment",
            name,
            spec={"selector": {"matchLabels": labels}, "template": template},
        ),
        _object(
            "v1",
            "Service",
            name,
            spec={"selector": labels, "ports": [{"port": port, "targetPort": "web"}]},
        ),
    )
