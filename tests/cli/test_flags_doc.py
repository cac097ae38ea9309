"""Flags, config and docs/flags.md say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from clusterproxy.addon.config import ControllersConfig, ManagerConfig
from clusterproxy.addon_agent.config import AddonAgentConfig
from clusterproxy.agent.config import AgentConfig
from clusterproxy.cli.addon_agent import addon_agent_flags
from clusterproxy.cli.addon_manager import manager_flags
from clusterproxy.cli.agent import agent_flags
from clusterproxy.cli.controllers import controllers_flags
from clusterproxy.cli.klog import LOG_FLAGS
from clusterproxy.cli.server import server_flags
from clusterproxy.cli.service_proxy import service_proxy_flags
from clusterproxy.cli.test_client import RequestsConfig, requests_flags
from clusterproxy.cli.test_server import PagesConfig, pages_flags
from clusterproxy.cli.user_server import user_server_flags
from clusterproxy.server.config import ServerConfig
from clusterproxy.service_proxy.config import ServiceProxyConfig
from clusterproxy.user_server.config import UserServerConfig

if TYPE_CHECKING:
    from clusterproxy.cli.goflags import FlagSet

DOC = Path(__file__).parents[2] / "docs" / "flags.md"
LOG_NAMES = {flag.name for flag in LOG_FLAGS}


def rows(heading: str) -> dict[str, list[str]]:
    """The table below *heading*: flag name -> the other cells."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", DOC.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section[1].splitlines()
        if line[:1] == "|"
    ]
    names = [row[0].strip("`").removeprefix("--") for row in cells[2:]]
    assert names == sorted(names), "the rows are in the order of the names"
    assert len(set(names)) == len(names)
    return dict(zip(names, (row[1:] for row in cells[2:]), strict=True))


TABLES = [
    ("proxy-server", server_flags()),
    ("proxy-agent", agent_flags()),
    ("addon-manager", manager_flags()),
    ("controllers", controllers_flags()),
    ("user-server", user_server_flags()),
    ("service-proxy", service_proxy_flags()),
    ("addon-agent", addon_agent_flags()),
    ("proxy-test-client", requests_flags()),
    ("proxy-test-server", pages_flags()),
]


@pytest.mark.parametrize(("heading", "flags"), TABLES)
def test_each_flag_has_its_row(heading: str, flags: FlagSet) -> None:
    own = {flag.name for flag in flags} - LOG_NAMES - {"help"}
    assert rows(heading).keys() == own
    assert rows("Logging, all programs").keys() == LOG_NAMES


@pytest.mark.parametrize(
    ("heading", "flags"),
    [*TABLES, ("Logging, all programs", server_flags())],
    ids=lambda value: str(value)[:12],
)
def test_defaults_and_flags_without_effect_are_told(heading: str, flags: FlagSet) -> None:
    for name, (default, meaning, note) in rows(heading).items():
        flag = flags[name]
        zero = ("false" if flag.kind.bare else "0") if isinstance(flag.default, int | float) else ""
        assert default.strip("`") == (flag.default_text.strip('"') or zero), name
        assert ("No effect" in note) == flag.no_effect, name
        assert meaning, name


@pytest.mark.parametrize(
    ("config", "flags", "others"),
    [
        (ServerConfig, server_flags(), {"given"}),
        (AgentConfig, agent_flags(), {"given", "server_addresses", "proxy_environment"}),
        (ManagerConfig, manager_flags(), {"given", "pod_namespace"}),
        (ControllersConfig, controllers_flags(), {"given", "pod_namespace"}),
        (UserServerConfig, user_server_flags(), {"given", "pod_namespace"}),
        (ServiceProxyConfig, service_proxy_flags(), {"given", "pod_namespace", "service_account"}),
        (AddonAgentConfig, addon_agent_flags(), {"given", "pod_namespace"}),
        (RequestsConfig, requests_flags(), set()),
        (PagesConfig, pages_flags(), set()),
    ],
)
def test_each_field_has_one_flag_with_its_default(
    config: Any, flags: FlagSet, others: set[str]
) -> None:
    fields = attrs.fields_dict(config)
    named = [flag.field for flag in flags if flag.field]
    assert sorted(named) == sorted(fields.keys() - others)
    made = config()
    for flag in flags:
        if flag.field and flag.name not in {"server-id", "agent-id", "proxy-strategies"}:
            assert flag.default == getattr(made, flag.field), flag.name
