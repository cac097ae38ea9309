"""The volumes of a pod as folders, laid out and changed as a kubelet does it."""

from __future__ import annotations

import base64
import re
import shutil
from itertools import count
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

Object = dict[str, Any]
Files = dict[str, bytes]

_VERSIONS: Final = count(1)


class NotThereError(Exception):
    """A Secret or ConfigMap that a pod waits for."""


def publish(folder: Path, files: Files) -> None:
    """Have *folder* hold these files, all changed at once.

    Names are links into ``..data``, itself a link to a folder that is replaced by one rename (Kubernetes,
    pkg/volume/util/atomic_writer.go, AtomicWriter.Write).
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "..data"
    before = data.resolve() if data.is_symlink() else None
    if before is not None and files == _read(before):
        return
    new = folder / f"..version-{next(_VERSIONS)}"
    for name, content in files.items():
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    new.mkdir(exist_ok=True)
    link = folder / "..data_tmp"
    link.symlink_to(new.name)
    link.rename(data)
    tops = {name.split("/")[0] for name in files}
    for top in tops:
        if not (folder / top).is_symlink():
            (folder / top).symlink_to(f"..data/{top}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in tops:
            entry.unlink()
    if before is not None:
        shutil.rmtree(before)


def _read(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(
    volume: Object,
    secrets: Mapping[str, Object],
    config_maps: Mapping[str, Object],
    tokens: Mapping[str, bytes],
    fields: Mapping[str, str],
) -> Files:
    """Return the files of a volume.

    Args:
      volume: an element of a pod's ``spec.volumes``.
      tokens: the service account tokens of projected volumes, by ``<volume>/<path>``.
      fields: what the downward API tells, by field path.

    Raises:
      NotThereError: it needs an object that is not there, or a key that this does not have.
    """
    name = volume["name"]
    if "emptyDir" in volume:
        return {}
    if "secret" in volume:
        source = volume["secret"]
        return _of_secret({**source, "name": source["secretName"]}, secrets)
    if "configMap" in volume:
        return _of_config_map(volume["configMap"], config_maps)
    if "downwardAPI" in volume:
        return _of_fields(volume["downwardAPI"]["items"], fields)
    if "projected" not in volume:
        raise AssertionError(f"no way to make the volume {volume}")
    files: Files = {}
    for source in volume["projected"]["sources"]:
        if "secret" in source:
            files |= _of_secret(source["secret"], secrets)
        elif "configMap" in source:
            files |= _of_config_map(source["configMap"], config_maps)
        elif "downwardAPI" in source:
            files |= _of_fields(source["downwardAPI"]["items"], fields)
        else:
            path = source["serviceAccountToken"]["path"]
            files[path] = tokens[f"{name}/{path}"]
    return files


def _of_secret(source: Object, secrets: Mapping[str, Object]) -> Files:
    found = secrets.get(source["name"])
    return _chosen("Secret", source, None if found is None else _decoded(found, "data"))


def _of_config_map(source: Object, config_maps: Mapping[str, Object]) -> Files:
    found = config_maps.get(source["name"])
    if found is None:
        return _chosen("ConfigMap", source, None)
    texts: dict[str, str] = found.get("data") or {}
    files = {key: text.encode() for key, text in texts.items()}
    return _chosen("ConfigMap", source, files | _decoded(found, "binaryData"))


def _decoded(obj: Object, field: str) -> Files:
    values: dict[str, str] = obj.get(field) or {}
    return {key: base64.b64decode(value) for key, value in values.items()}


def _chosen(kind: str, source: Object, data: Files | None) -> Files:
    if data is None:
        if source.get("optional"):
            return {}
        raise NotThereError(f"{kind} {source['name']} not found")
    if "items" not in source:
        return data
    files: Files = {}
    for item in source["items"]:
        if item["key"] in data:
            files[item["path"]] = data[item["key"]]
        elif not source.get("optional"):
            raise NotThereError(f"{kind} {source['name']} has no key {item['key']}")
    return files


def _of_fields(items: Iterable[Object], fields: Mapping[str, str]) -> Files:
    return {item["path"]: fields[item["fieldRef"]["fieldPath"]].encode() for item in items}


def moved(text: str, mounts: Mapping[str, Path]) -> str:
    """Return an argument or value with the paths of mounts replaced by those of their folders."""
    # The longest first: a mount may lie in another.
    for path in sorted(mounts, key=len, reverse=True):
        text = re.sub(
            rf"(?<![\w./-]){re.escape(path)}(?=/|$|[^\w.-])",
            lambda _, to=str(mounts[path]): to,  # type: ignore[misc]
            text,
        )
    return text


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with ``$(NAME)`` replaced; what is not known stays, and ``$$`` is a dollar."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([\w.-]+)\)", value, text)
