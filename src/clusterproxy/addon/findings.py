"""What is found out about a configuration while it is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clusterproxy.kube.resource import list_at, text_at

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

    from .contention import ConflictingWriter

# The types of conditions: the original's, and ours.
SERVER_SIGNED: Final = "ProxyServerSecretSigned"
AGENT_SIGNED: Final = "AgentServerSecretSigned"
USER_SIGNED: Final = "UserServerSecretSigned"
CLIENT_SIGNED: Final = "ProxyClientSecretSigned"
DEPLOYED: Final = "ProxyServerDeployed"

VALID: Final = "ConfigurationValid"
ENTRYPOINT: Final = "EntrypointProvisioned"
RECONCILED: Final = "Reconciled"


#: There while the CA is being replaced, or should be: True if that goes on by itself, False if it waits for somebody.
CA_ROTATION: Final = "CARotation"


class Blocked(Exception):
    """The rest has to wait for something; the condition says for what."""

    def __init__(self, kind: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason


class Findings:
    """Conditions, those of which nothing is to be told any more, and objects that somebody else changes back all the time."""

    def __init__(self) -> None:
        self.conditions: list[Object] = []
        self.contended: list[ConflictingWriter] = []
        self.withdrawn: set[str] = set()

    def note(self, kind: str, status: bool, reason: str, message: str = "") -> None:
        self.conditions = [each for each in self.conditions if each["type"] != kind]
        self.conditions.append(
            {
                "type": kind,
                "status": "True" if status else "False",
                "reason": reason,
                "message": message,
            }
        )


def told(live: Object, kind: str) -> str:
    """Return what a configuration's condition says at present; nothing without one."""
    for condition in list_at(live, "status", "conditions"):
        if text_at(condition, "type") == kind:
            return text_at(condition, "message")
    return ""
