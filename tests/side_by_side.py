"""``python tests/side_by_side.py -- COMMAND... -- COMMAND...``: run commands at the same time.

What the first one writes is seen at once, what the others write once they have ended, so that each can be read as a whole. The exit status
is 1 if one of them failed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile


def main(arguments: list[str]) -> int:
    commands: list[list[str]] = []
    for word in arguments:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    first, *others = commands
    outputs = [tempfile.TemporaryFile() for _ in others]  # noqa: SIM115  closed with the process
    running = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        for command, output in zip(others, outputs, strict=True)
    ]
    statuses = [subprocess.call(first)]
    for process, output in zip(running, outputs, strict=True):
        statuses.append(process.wait())
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
        sys.stdout.flush()
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
