"""The public names: what tests/public_surface.txt pins, and docs/api.md explains. Run it to write both anew (``make docs``)."""

from __future__ import annotations

import enum
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
GOLDEN: Final = ROOT / "tests" / "public_surface.txt"
REFERENCE: Final = ROOT / "docs" / "api.md"

MODULES: Final = ("clusterproxy", "clusterproxy.client", "clusterproxy_proto")

# Chapters of the reference: title, module, names.
CHAPTERS: Final = (
    ("Tunnels", "clusterproxy", ("open_tunnel", "Tunnel", "Server", "ClientTLS")),
    ("Streams", "clusterproxy", ("TunnelStream", "HalfCloseableTunnelStream")),
    ("For programs that can only dial themselves", "clusterproxy", ("serve_local", "forward_stream")),
    (
        "Exceptions",
        "clusterproxy",
        ("ClusterProxyError", "ConnectError", "ConnectCause", "DialError", "DialCause", "DialReason", "Hop", "ConfigError"),
    ),
    ("Metrics", "clusterproxy", ("ClientMetrics",)),
    ("Metrics", "clusterproxy.telemetry.exposition", ("render",)),
    ("httpx and httpcore", "clusterproxy.client.httpcore_backend", ("TunnelTransport", "TunnelBackend")),
    ("anyio", "clusterproxy.client.anyio_stream", ("AnyioStream",)),
    (
        "Beside the hub",
        "clusterproxy.addon_agent.library",
        ("open_hub", "tls_of_secrets", "forward_to_pods", "service_host", "service_proxy_host"),
    ),
)  # fmt: skip

_HEAD: Final = """# API reference

Made from the docstrings by `make docs`. [library.md](library.md) explains how to use it, with examples.

Times are seconds, sizes bytes. Ends of a transport are trio's exceptions: `BrokenResourceError` is the peer's doing,
`ClosedResourceError` our own. Members that a class has from its bases are not repeated. [metrics.md](metrics.md) has the metrics.
"""


class _Text(str):
    """Annotations are text already; as they are, :mod:`inspect` would put them into quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def public_names(module: str) -> list[str]:
    """The names that a module offers, be they loaded yet or not."""
    found = import_module(module)
    origins = ("clusterproxy", "typing", "types")
    return [
        name
        for name in sorted(dir(found))
        if name[0] != "_"
        and not inspect.ismodule(thing := getattr(found, name))
        and getattr(thing, "__module__", "").startswith(origins)
    ]


# -- signatures ------------------------------------------------------------------------------------


def signature(function: Any, *, bound: bool = False) -> str:
    """The signature of a function as its source has it, without ``self`` if it is *bound*."""
    found = inspect.signature(function)
    parameters = [
        one.replace(
            annotation=one.annotation if one.annotation is one.empty else _text(one.annotation),
            default=one.default if one.default is one.empty else _default(one.default),
        )
        for one in found.parameters.values()
    ][int(bound) :]
    returned = found.return_annotation
    if returned is not found.empty:
        returned = _text(returned)
    return str(found.replace(parameters=parameters, return_annotation=returned))


def _text(annotation: object) -> _Text:
    if isinstance(annotation, type):
        return _Text(annotation.__qualname__)
    return _Text("None" if annotation is None else annotation)


def _default(value: object) -> object:
    if isinstance(value, enum.Enum):
        return _Text(f"{type(value).__name__}.{value.name}")
    return value if isinstance(value, str | bytes | int | float | None) else _Text("...")


def kind_of(function: Any) -> str:
    """``async`` and the like, as it is written in front of a call."""
    inner = inspect.unwrap(function)
    if inspect.isasyncgenfunction(inner) and inner is not function:
        return "async with "
    return "await " if inspect.iscoroutinefunction(function) else ""


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines, in the order of the source."""
    for name, member in vars(cls).items():
        if not name.startswith("_") and isinstance(
            member, property | classmethod | staticmethod | FunctionType
        ):
            yield name, member


def constructible(cls: type) -> bool:
    """Whether others make objects of the class, rather than get them from us."""
    return not inspect.isabstract(cls) and "__init__" in vars(cls)


# -- what is pinned --------------------------------------------------------------------------------


def surface() -> str:
    """One line for each public name, and for each member of the classes among them."""
    offered = [(module, name) for module in MODULES for name in public_names(module)]
    offered += [
        (module, name) for _, module, names in CHAPTERS if module not in MODULES for name in names
    ]
    lines: list[str] = []
    first: dict[int, str] = {}
    for module, name in offered:
        thing = getattr(import_module(module), name)
        path = f"{module}.{name}"
        known = first.setdefault(id(thing), path)
        lines += _pin(path, thing) if known == path else [f"{path} = {known}"]
    return "".join(line + "\n" for line in lines)


def _pin(path: str, thing: Any) -> Iterator[str]:
    if not isinstance(thing, type):
        if callable(thing):
            yield f"{path}{signature(thing)}"
        else:
            yield f"{path} = {' | '.join(one.__name__ for one in get_args(thing))}"
        return
    cls: type[Any] = thing
    yield f"class {path}({', '.join(base.__qualname__ for base in cls.__bases__)})"
    if issubclass(cls, enum.Enum):
        for member in cls:
            yield f"  {member.name} = {member.value}"
        return
    if constructible(cls):
        yield f"  {signature(cls)}"
    for name, member in members(cls):
        if isinstance(member, property):
            yield f"  {name}: {_text(inspect.signature(_getter(member)).return_annotation)}"
        else:
            kind = f"{type(member).__name__} " if isinstance(member, classmethod) else ""
            function = getattr(cls, name)
            yield f"  {kind}{kind_of(function)}{name}{signature(function)}"


def _getter(member: property) -> Any:
    return member.fget


# -- the reference ---------------------------------------------------------------------------------


def reference() -> str:
    """The text of docs/api.md."""
    parts = [_HEAD]
    title = ""
    for chapter, module, names in CHAPTERS:
        if chapter != title:
            parts.append(f"## {chapter}\n")
            title = chapter
        for name in names:
            parts += _explain(module, name, getattr(import_module(module), name))
    return "\n".join(parts)


def _explain(module: str, name: str, thing: Any) -> Iterator[str]:
    where = "" if module == "clusterproxy" else f"{module}."
    if not isinstance(thing, type):
        yield f"### {where}{name}\n"
        yield _code(f"{kind_of(thing)}{name}", signature(thing))
        yield markdown(thing)
        return
    cls: type[Any] = thing
    yield f"### class {where}{name}\n"
    if constructible(cls) and not issubclass(cls, enum.Enum):
        yield _code(name, re.sub(r" -> None$", "", signature(cls)))
    bases = [f"`{_full_name(base)}`" for base in cls.__bases__ if base.__name__ not in _PLAIN]
    if bases:
        yield f"Bases: {', '.join(bases)}\n"
    yield markdown(cls)
    if issubclass(cls, enum.Enum):
        yield (
            "Values: " + ", ".join(f"`{member.name}` (`{member.value}`)" for member in cls) + "\n"
        )
        return
    for attribute, member in members(cls):
        if not inspect.getdoc(member) and _foreign(cls, attribute):
            continue
        path = f"{name}.{attribute}"
        if isinstance(member, property):
            returned = _text(inspect.signature(_getter(member)).return_annotation)
            yield f"#### {path}\n"
            yield _code(f"{attribute}: {returned}", "")
        else:
            function = getattr(cls, attribute)
            yield f"#### {path}()\n"
            is_class = isinstance(member, classmethod)
            yield _code(
                f"{kind_of(function)}{name + '.' if is_class else ''}{attribute}",
                signature(function, bound=not is_class),
            )
        yield markdown(member)


def _foreign(cls: type, attribute: str) -> bool:
    """Whether a member is there because another library's interface has it."""
    others = (base for base in cls.__mro__ if not base.__module__.startswith("clusterproxy"))
    return any(hasattr(base, attribute) for base in others)


_PLAIN: Final = {"object", "ABC"}


def _full_name(cls: type) -> str:
    if cls.__module__.startswith("clusterproxy") or cls.__module__ == "builtins":
        return cls.__name__
    return f"{cls.__module__}.{cls.__name__}"


def _code(call: str, rest: str) -> str:
    line = call + rest
    if len(line) > 100:
        inner, _, returned = rest.rpartition(")")
        arguments = "".join(f"    {one},\n" for one in _split(inner[1:]))
        line = f"{call}(\n{arguments}){returned}"
    return f"```python\n{line}\n```\n"


def _split(arguments: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


_LIST: Final = re.compile(r"(Args|Attributes|Raises):")
_REMARK: Final = re.compile(r"(Cancellation|Source|Returns|Yields)(?:\b:?)\s+")


def markdown(thing: object) -> str:
    """The docstring of *thing*, of Google's style, as Markdown.

    Raises:
      ValueError: there is none.
    """
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"{thing!r} has no docstring")
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")
    blocks = [_block(block) for block in re.split(r"\n{2,}", text)]
    return "\n\n".join(blocks) + "\n"


def _block(block: str) -> str:
    first, _, rest = block.partition("\n")
    section = _LIST.fullmatch(first)
    if section is None:
        return _REMARK.sub(r"**\1:** ", block, count=1) if _REMARK.match(block) else block
    items = [re.sub(r"\s*\n\s+", " ", item) for item in re.split(r"\n(?=  \S)", "\n" + rest)[1:]]
    return f"**{section[1]}:**\n\n" + "\n".join(f"- {_item(item.strip())}" for item in items)


def _item(text: str) -> str:
    name, colon, rest = text.partition(": ")
    return f"`{name}`: {rest}" if colon and re.fullmatch(r"[\w.*, ]+", name) else text


def write() -> None:
    """Write both files."""
    GOLDEN.write_text(surface())
    REFERENCE.write_text(reference())


if __name__ == "__main__":
    write()
