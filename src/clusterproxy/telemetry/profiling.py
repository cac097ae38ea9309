"""The pages below ``/debug/pprof/``: what of Go's profiles has a meaning here, and an honest no for the rest."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import trio

from clusterproxy.http1 import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NOSNIFF = {"X-Content-Type-Options": "nosniff"}
_INDEX = b"""<html>
<head>
<title>/debug/pprof/</title>
</head>
<body>
/debug/pprof/
<ul>
<li><a href="cmdline">cmdline</a>: The command line of this process, arguments separated by NUL bytes</li>
<li><a href="goroutine">goroutine</a>: The tree of trio tasks with the stack of each</li>
</ul>
<p>CPU profiles and traces: run <code>py-spy</code> beside the process.</p>
</body>
</html>
"""


def task_tree() -> str:
    """Return the tree of all trio tasks, two spaces a level, each with its stack, outermost call first.

    Source lines are left out: reading files here would hold up every tunnel of the process.
    """
    task = trio.lowlevel.current_task()
    while task.parent_nursery is not None:
        task = task.parent_nursery.parent_task
    return "".join(f"{line}\n" for line in _task_lines(task, ""))


def _task_lines(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    yield f"{indent}{task.name}"
    for frame, line_number in task.iter_await_frames():
        code = frame.f_code
        yield f"{indent}    {code.co_filename}:{line_number} {code.co_qualname}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _task_lines(child, indent + "  ")


def _index(_request: Request) -> Response:
    return Response(200, _INDEX, "text/html; charset=utf-8", headers=_NOSNIFF)


def _cmdline(_request: Request) -> Response:
    return Response(200, b"\0".join(os.fsencode(arg) for arg in sys.orig_argv), headers=_NOSNIFF)


def _goroutine(_request: Request) -> Response:
    return Response(200, task_tree().encode(), headers=_NOSNIFF)


def _unavailable(request: Request) -> Response:
    name = request.path.rpartition("/")[2]
    text = (
        f"{name} is not available: this is a Python program. Profile it from outside with py-spy, for example\n"
        f"py-spy record --pid {os.getpid()} --duration 30 --output profile.svg\n"
    )
    return Response(501, text.encode(), headers=_NOSNIFF)


PROFILING_ROUTES: dict[str, Callable[[Request], Response]] = {
    "/debug/pprof/": _index,
    "/debug/pprof/cmdline": _cmdline,
    "/debug/pprof/goroutine": _goroutine,
    "/debug/pprof/profile": _unavailable,
    "/debug/pprof/symbol": _unavailable,
    "/debug/pprof/trace": _unavailable,
}
