"""What Open Cluster Management installs on a hub and on a managed cluster, as its own module has it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import yaml

from kube.build import ocm_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

Object = dict[str, Any]

CLUSTER_MANAGER_NAMESPACE: Final = "open-cluster-management-hub"
KLUSTERLET_NAMESPACE: Final = "open-cluster-management-agent"
REGISTRATION_ACCOUNT: Final = "klusterlet-registration-sa"
WORK_ACCOUNT: Final = "klusterlet-work-sa"

HUB: Final = "manifests/cluster-manager/hub"
CLUSTER: Final = "pkg/registration/hub/manifests/rbac"
KLUSTERLET: Final = "manifests/klusterlet/managed"

_ACTION: Final = re.compile(r"{{-?\s*(.*?)\s*-?}}")
_VALUES: Final = {
    "ClusterManagerName": "cluster-manager",
    "ClusterManagerNamespace": CLUSTER_MANAGER_NAMESPACE,
    "KlusterletName": "klusterlet",
    "KlusterletNamespace": KLUSTERLET_NAMESPACE,
    "RegistrationServiceAccount": REGISTRATION_ACCOUNT,
    "WorkServiceAccount": WORK_ACCOUNT,
}


def ocm_objects(folder: str, *names: str, **values: str) -> list[Object]:
    """Return the objects of files of OCM's module, all of a folder without *names*.

    Args:
      values: of the templates, beside those that are the same in all tests.

    Raises:
      MissingProgramError: the module cannot be had.
      ValueError: a template has what this does not know.
    """
    place = ocm_folder() / folder
    paths = [place / name for name in names] or sorted(place.glob("*.yaml"))
    return [
        document
        for path in paths
        for document in yaml.safe_load_all(_rendered(path.read_text(), {**_VALUES, **values}))
        if document
    ]


def _rendered(template: str, values: Mapping[str, str]) -> str:
    """Return a template of Go with its values: as much of that language as OCM's files have.

    Labels that an administrator gives all objects are not among the values, so their blocks are left out.
    """
    text: list[str] = []
    shown: list[bool] = []
    place = 0
    for action in _ACTION.finditer(template):
        if all(shown):
            text.append(template[place : action.start()])
        place = action.end()
        match action[1].split():
            case ["if", "gt", "(len", ".Labels)", "0"] | ["range", *_]:
                shown.append(False)
            case ["if", name] if name.startswith("."):
                shown.append(bool(values.get(name[1:])))
            case ["else"]:
                shown[-1] = not shown[-1]
            case ["end"]:
                shown.pop()
            case [name] if name.startswith(".") and name[1:] in values:
                text += [values[name[1:]]] if all(shown) else []
            case _ if all(shown):
                raise ValueError(f"not known of Go's templates: {action[0]}")
            case _:
                pass
    return "".join([*text, template[place:]])
