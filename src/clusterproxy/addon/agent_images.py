"""Names of images, and the mirrors that a cluster takes them from. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from .fields import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .fields import Fields

# Source: the grammar of github.com/distribution/reference; a registry may be any host, with a port.
_NAME: Final = re.compile("[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
_REGISTRY: Final = re.compile(r"[A-Za-z0-9._:\[\]-]+(?:/[a-z0-9._-]+)*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST: Final = re.compile(r"[A-Za-z0-9]+(?:[.+_-][A-Za-z0-9]+)*:[0-9a-fA-F]{32,}")


@attrs.frozen
class Image:
    """An image, as the agent's chart is told of it.

    Attributes:
      registry: with a path of its own, perhaps; empty for the container runtime's default.
      name: the last part.
      tag: empty if there is a digest only.
      digest: with its algorithm, or empty. It decides, whatever the tag is.
    """

    registry: str
    name: str
    tag: str
    digest: str = ""

    def __str__(self) -> str:
        registry = f"{self.registry}/" if self.registry else ""
        tag = f":{self.tag}" if self.tag else ""
        return f"{registry}{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


def parse_image(text: str) -> Image:
    """Read ``REGISTRY[:PORT]/PATH/NAME[:TAG][@DIGEST]``; the tag is ``latest`` if there is nothing else.

    Source: upstream ``pkg/config/agent.go`` ``ParseImage``, which does not know digests.

    Raises:
      ValueError: it is no name of an image; says what an image looks like.
    """
    rest, at, digest = text.partition("@")
    registry, slash, last = rest.rpartition("/")
    name, colon, tag = last.partition(":")
    if (
        not _NAME.fullmatch(name)
        or (slash and not _REGISTRY.fullmatch(registry))
        or (colon and not _TAG.fullmatch(tag))
        or (at and not _DIGEST.fullmatch(digest))
    ):
        raise ValueError(
            f"{shown(text)} is no image: write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
        )
    return Image(registry, name, tag if colon or at else "latest", digest)


@attrs.frozen
class Mirror:
    """Where images whose names begin with *source* are to be taken from; an empty source stands for all registries."""

    source: str
    mirror: str

    def apply(self, image: str) -> str:
        """Return the image's name at the mirror, or *image* itself if it is not mirrored.

        A mirror without a name is none.
        """
        source, mirror = self.source.removesuffix("/"), self.mirror.removesuffix("/")
        if not mirror or not image.startswith(source):
            return image
        return mirror + image.removeprefix(source) if source else f"{mirror}/{_last(image)}"


def mirrored(image: str, mirrors: Iterable[Mirror]) -> str:
    """Return where *image* is to be taken from: of the mirrors that have it, the last.

    Source: addon-framework ``pkg/utils/image.go`` ``OverrideImageByAnnotation``.
    """
    found = image
    for mirror in mirrors:
        name = mirror.apply(image)
        if name != image:
            found = name
    return found


def parse_mirrors(fields: Fields) -> tuple[Mirror, ...]:
    """Read the list ``registries``; what is wrong is noted in *fields*."""
    found: list[Mirror] = []
    for called, element in fields.items("registries"):
        entry = fields.element(called, element)
        found.append(Mirror(entry.text("source"), entry.text("mirror")))
    return tuple(found)


def _last(image: str) -> str:
    """Return an image without its registry. A digest has no slash."""
    return image.rpartition("/")[2]
