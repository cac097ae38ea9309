"""grpc-go's interop client against our RPC layer (grpc/doc/interop-test-descriptions.md)."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from go_tools import go_tool, needs_go, rpc_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The first use may have to build the client.
pytestmark = [pytest.mark.programs, needs_go, pytest.mark.timeout(600)]

# Every case that needs no credentials and no xDS.
CASES = (
    "cancel_after_begin",
    "cancel_after_first_response",
    "client_streaming",
    "custom_metadata",
    "empty_stream",
    "empty_unary",
    "large_unary",
    "ping_pong",
    "server_streaming",
    "special_status_message",
    "status_code_and_message",
    "timeout_on_sleeping_server",
    "unimplemented_method",
    "unimplemented_service",
)


@pytest.fixture(scope="module")
def client() -> Path:
    return go_tool("interop-client")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with rpc_port() as number:
        yield number


@pytest.mark.parametrize("case", CASES)
def test_interop(case: str, client: Path, port: int) -> None:
    command = (
        client,
        "-server_host=127.0.0.1",
        f"-server_port={port}",
        f"-test_case={case}",
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
