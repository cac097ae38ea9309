"""How a program starts and ends: what cobra, klog and ``main`` do around ``Run`` in the originals."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import sys
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from clusterproxy.errors import ConfigError
from clusterproxy.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from .goflags import FlagSet, Parsed

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

_logger = logging.getLogger("clusterproxy.cli")


class _Config(Protocol):
    @property
    def log_format(self) -> str: ...
    @property
    def verbosity(self) -> int: ...
    def validate(self) -> None: ...


_C = TypeVar("_C", bound=_Config)


def run_program(
    flags: FlagSet,
    options: str,
    build: Callable[[Parsed], _C],
    load: Callable[[], Callable[[_C], Awaitable[int]]],
    argv: Sequence[str] | None,
) -> int:
    """Run a program to its end and return its exit status, 1 for anything that keeps it from work.

    *options* is upstream's word for the configuration ("server options"). *load* imports the
    program, which is left until the configuration is known to be good.
    """
    try:
        parsed = flags.parse(sys.argv[1:] if argv is None else argv)
        if parsed.values["help"]:
            return _show(flags.help())
        config = build(parsed)
    except ConfigError as exc:
        return _misused(flags, exc.message)
    configure_logging(format=config.log_format, verbosity=config.verbosity)
    _tell(flags, parsed, config)
    try:
        config.validate()
    except ConfigError as exc:
        return _misused(flags, f"failed to validate {options} with {exc.message}")
    try:
        return _run(load(), config)
    except (ConfigError, OSError, ExceptionGroup) as exc:
        leaves = list(_leaves(exc))
        if not all(isinstance(leaf, (ConfigError, OSError)) for leaf in leaves):
            raise
        _logger.debug("could not go on", exc_info=exc)
        return _failed(leaves[0])


def _show(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as exc:
        # Python tries once more at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # As after `| head`: nobody reads any more.
        return 1 if isinstance(exc, BrokenPipeError) else _failed(exc)
    return 0


def _run(main: Callable[[_C], Awaitable[int]], config: _C) -> int:
    import trio

    # As Go's runtime does at start: every connection is a file descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _keep_memory()
    # What is loaded by now stays to the end: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    # Cycles are rare here; a burst of new tunnels should not be walked through every 700 objects.
    gc.set_threshold(50_000, 20, 20)
    return trio.run(main, config)


def _keep_memory() -> None:
    """Let glibc keep what a batch needs (mallopt(3)).

    By default it gives 128 KiB back to the kernel after each batch and asks for them at the next one,
    which costs a system call and page faults each time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
    mallopt(_M_MMAP_THRESHOLD, 4 * 1024 * 1024)
    mallopt(_M_TRIM_THRESHOLD, 16 * 1024 * 1024)


def _tell(flags: FlagSet, parsed: Parsed, config: _Config) -> None:
    for name in sorted(parsed.given):
        if reason := flags[name].deprecated:
            _logger.warning("Flag --%s has been deprecated, %s", name, reason)
    if parsed.arguments:
        _logger.warning("arguments that belong to no flag are ignored: %s", parsed.arguments)
    if ignored := [f"--{name}" for name in sorted(parsed.given) if flags[name].no_effect]:
        _logger.info("flags without effect in this implementation: %s", " ".join(ignored))
    if config.verbosity >= 1:
        for name, value in sorted(parsed.values.items()):
            _logger.info("--%s is %r", name, value)


def _misused(flags: FlagSet, message: str) -> int:
    """Say what is wrong below the usage text, so that it is the last thing to be seen."""
    sys.stderr.write(f"{flags.usage()}\nerror: {message}\n")
    return 1


def _failed(error: BaseException) -> int:
    text = str(error)
    if isinstance(error, ConfigError) and f"--{error.field}" not in text:
        text = f"--{error.field}: {text}"
    sys.stderr.write(f"error: {text}\n")
    return 1


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _leaves(inner)  # pyright: ignore[reportUnknownArgumentType]
    else:
        yield exc
