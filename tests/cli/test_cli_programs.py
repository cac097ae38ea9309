"""From the command line to the program's exit status, with the programs themselves played."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from clusterproxy import __version__
from clusterproxy.agent.config import AgentConfig
from clusterproxy.cli import agent, server
from clusterproxy.cli.main import main
from clusterproxy.errors import ConfigError
from clusterproxy.server.config import ServerConfig

Play = Callable[[Callable[[Any], Awaitable[int]]], None]


@pytest.fixture(autouse=True)
def process_state(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Put back what a program sets for its whole process; give it no environment of ours."""
    for name in (
        "PROXY_SERVER_ID",
        "PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT",
        "PROXY_SERVER_AGENT_IDENTITY",
        "PROXY_AGENT_ID",
        "HTTPS_PROXY",
        "https_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    root, ours = logging.getLogger(), logging.getLogger("clusterproxy")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    gc.unfreeze()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Stand in for both programs."""

    def play(program: Callable[[Any], Awaitable[int]]) -> None:
        for name, function in (("server", "run_server"), ("agent", "run_agent")):
            module = ModuleType(f"clusterproxy.{name}.app")
            setattr(module, function, program)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return play


@pytest.fixture
def configs(play: Play) -> list[Any]:
    """What the programs were started with; they end well."""
    seen: list[Any] = []

    async def program(config: Any) -> int:
        seen.append(config)
        return 0

    play(program)
    return seen


@pytest.fixture
def ca(tmp_path: Path) -> str:
    path = tmp_path / "ca.crt"
    path.touch()
    return str(path)


def test_the_server_gets_its_config(configs: list[ServerConfig], ca: str) -> None:
    assert server.main([
        f"--server-ca-cert={ca}", "--proxy-strategies=destHost,,default", "--backend-dial-timeout", "0s",
        "--keepalive_time=1m30s", "--cipher-suites=TLS_AES_128_GCM_SHA256", "--enable-profiling", "-v=0",
        "--max-header-list-size=0x8000", "--server-id=", "--log-format", "json",
    ]) == 0  # fmt: skip
    (config,) = configs
    assert config == ServerConfig(
        server_ca_cert=ca,
        proxy_strategies=("destHost", "default"),
        backend_dial_timeout_s=0.0,
        keepalive_time_s=90.0,
        cipher_suites=("TLS_AES_128_GCM_SHA256",),
        enable_profiling=True,
        max_header_list_bytes=32768,
        log_format="json",
        server_id=config.server_id,
        given=frozenset({
            "server-ca-cert", "proxy-strategies", "backend-dial-timeout", "keepalive-time", "cipher-suites",
            "enable-profiling", "v", "max-header-list-size", "server-id", "log-format",
        }),
    )  # fmt: skip
    assert len(config.server_id) == 36


def test_the_agent_gets_its_config(
    configs: list[AgentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "a,b")
    assert agent.main([
        "--proxy-server-host=a,b:1", "--proxy-server-port=2", "--alpn-proto=x", "--alpn-proto=y", "--lease-label=a=b",
        "--agent-id=me", "--sync-interval=100ms",
    ]) == 0  # fmt: skip
    assert configs == [
        AgentConfig(
            proxy_server_host="a,b:1",
            proxy_server_port=2,
            server_addresses=(("a", 2), ("b", 1)),
            alpn_protos=("x", "y"),
            lease_label_selector="a=b",
            agent_id="me",
            sync_interval_s=0.1,
            proxy_environment={"https_proxy": "http://proxy:3128", "NO_PROXY": "a,b"},
            given=frozenset({
                "proxy-server-host", "proxy-server-port", "alpn-proto", "lease-label", "lease-label-selector",
                "agent-id", "sync-interval",
            }),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(("args", "server_id"), [([], "from-env"), (["--server-id=flag"], "flag")])
def test_the_environment_names_the_server(
    configs: list[ServerConfig],
    ca: str,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    server_id: str,
) -> None:
    monkeypatch.setenv("PROXY_SERVER_ID", "from-env")
    assert server.main([f"--server-ca-cert={ca}", *args]) == 0
    assert configs[0].server_id == server_id


def test_the_environment_names_the_agent(
    configs: list[AgentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXY_AGENT_ID", "from-env")
    assert agent.main([]) == 0
    assert configs[0].agent_id == "from-env"


def test_sys_argv_is_read_by_default(
    configs: list[AgentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["proxy-agent", "--agent-id=me"])
    assert agent.main() == 0
    assert configs[0].agent_id == "me"


@pytest.mark.parametrize("run", [server.main, agent.main])
def test_help_goes_to_standard_output(
    configs: list[Any], capsys: pytest.CaptureFixture[str], run: Callable[[list[str]], int]
) -> None:
    assert run(["-h"]) == 0
    out, err = capsys.readouterr()
    assert "\nUsage:\n  proxy-" in out
    assert "  -v, --v Level" in out
    # Other names and flags on their way out are not for newcomers.
    assert "--lease-label " not in out or run is server.main
    assert (err, configs) == ("", [])


@pytest.mark.parametrize(
    ("run", "args", "message"),
    [
        (server.main, ["--nope"], "unknown flag: --nope"),
        (agent.main, ["--proxy-server-host="], 'proxy server host "" is not an address'),
        (
            agent.main,
            ["--log-format=xml"],
            "invalid argument \"xml\" for \"--log-format\" flag: must be 'text' or 'json'",
        ),
        (
            server.main,
            [],
            (
                "failed to validate server options with "
                "server ca cert must be set when in TCP mode (uds-name is empty)"
            ),
        ),
        (
            server.main,
            ["--uds-name=/s", "--server-port=0", "--proxy-strategies=,"],
            (
                "failed to validate server options with "
                "invalid proxy strategies: proxy strategies cannot be empty"
            ),
        ),
        (
            agent.main,
            ["--lease-label=", "--count-server-leases"],
            "failed to validate agent options with empty string provided",
        ),
    ],
)
def test_a_bad_command_line_is_told_below_the_usage(
    configs: list[Any],
    capsys: pytest.CaptureFixture[str],
    run: Callable[[list[str]], int],
    args: list[str],
    message: str,
) -> None:
    assert run(args) == 1
    out, err = capsys.readouterr()
    assert err.startswith("Usage:\n  proxy-")
    assert err.endswith(f"\n\nerror: {message}\n")
    assert (out, configs) == ("", [])


@pytest.mark.parametrize(
    ("value", "argv", "seconds"),
    [
        ("", [], 0),
        ("1m30s", [], 90),
        ("1m30s", ["--agent-arrival-timeout=5s"], 5),
        ("nonsense", ["--agent-arrival-timeout=5s"], 5),
    ],
)
def test_the_environment_may_say_how_long_dials_wait(
    configs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    argv: list[str],
    seconds: float,
) -> None:
    monkeypatch.setenv("PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT", value)
    assert server.main(["--uds-name=x", "--server-port=0", *argv]) == 0
    assert configs[0].agent_arrival_timeout_s == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "soon",
            'invalid value "soon" of the environment\'s PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT: time: invalid duration "soon"',
        ),
        (
            "-1s",
            "failed to validate server options with agent-arrival-timeout must be >= 0, got -1s",
        ),
    ],
)
def test_what_the_environment_says_is_checked(
    configs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv("PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT", value)
    assert server.main(["--uds-name=x", "--server-port=0"]) == 1
    assert capsys.readouterr().err.endswith(f"\n\nerror: {message}\n")
    assert configs == []


@pytest.mark.parametrize(
    ("value", "argv", "mode"),
    [
        (None, [], "off"),
        ("", [], "off"),
        ("verify", [], "verify"),
        ("verify", ["--agent-identity=off"], "off"),
        ("nonsense", ["--agent-identity=verify"], "verify"),
    ],
)
def test_the_environment_may_say_whether_agents_are_looked_at(
    configs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    argv: list[str],
    mode: str,
) -> None:
    if value is not None:
        monkeypatch.setenv("PROXY_SERVER_AGENT_IDENTITY", value)
    assert server.main(["--uds-name=x", "--server-port=0", *argv]) == 0
    assert configs[0].agent_identity == mode


def test_what_the_environment_says_of_agents_is_checked(
    configs: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROXY_SERVER_AGENT_IDENTITY", "Verify")
    assert server.main(["--uds-name=x", "--server-port=0"]) == 1
    assert capsys.readouterr().err.endswith(
        "\n\nerror: the environment's PROXY_SERVER_AGENT_IDENTITY must be one of off, verify, require, "
        'not "Verify"\n'
    )
    assert configs == []


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ConfigError("ca-cert", "no certificate in x.pem"), "--ca-cert: no certificate in x.pem"),
        (ConfigError("ca-cert", "--ca-cert is broken"), "--ca-cert is broken"),
        (OSError(98, "Address already in use", "x"), "[Errno 98] Address already in use: 'x'"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_failed_start_is_told_in_one_line(
    play: Play, capsys: pytest.CaptureFixture[str], problem: Exception, message: str, deep: bool
) -> None:
    async def fail() -> None:
        raise problem

    async def program(config: AgentConfig) -> int:
        if not deep:
            raise problem
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(fail)
            outer.start_soon(trio.sleep_forever)
        return 0

    play(program)
    assert agent.main([]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_bug_is_not_taken_for_a_failed_start(play: Play) -> None:
    async def program(config: AgentConfig) -> int:
        raise ExceptionGroup("both", [OSError(98, "in use"), ZeroDivisionError()])

    play(program)
    with pytest.raises(ExceptionGroup):
        agent.main([])


def test_the_programs_exit_status_is_passed_on(play: Play) -> None:
    async def program(config: AgentConfig) -> int:
        await trio.lowlevel.checkpoint()
        return 3

    play(program)
    assert agent.main([]) == 3


def test_odd_but_accepted_flags_are_logged(
    configs: list[Any], capsys: pytest.CaptureFixture[str], ca: str
) -> None:
    assert server.main([
        f"--server-ca-cert={ca}", "--warn-on-channel-limit", "--log_dir=/x", "--enable-profiling", "false",
        "--tls-min-version=VersionTLS10",
    ]) == 0  # fmt: skip
    err = capsys.readouterr().err
    for expected in (
        "WARNING clusterproxy.cli Flag --warn-on-channel-limit has been deprecated, This behavior",
        "WARNING clusterproxy.cli arguments that belong to no flag are ignored: ('false',)",
        "INFO clusterproxy.cli flags without effect in this implementation: --log-dir --warn-on-channel-limit",
        "WARNING clusterproxy.server.config --tls-min-version=VersionTLS10 is below TLS 1.2",
    ):
        assert expected in err
    assert len(err.splitlines()) == 4


def test_all_is_quiet_by_default(configs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main([]) == 0
    assert capsys.readouterr() == ("", "")


def test_settings_are_logged_on_request(
    configs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.main(["--v=1", "--sync-interval=2s"]) == 0
    assert "INFO clusterproxy.cli --sync-interval is 2.0\n" in capsys.readouterr().err


def test_clusterproxy_passes_arguments_through(configs: list[AgentConfig]) -> None:
    # click would take `-v4`, `--help=false` and `--` for itself.
    result = CliRunner().invoke(
        main, ["agent", "-v4", "--help=false", "--agent_id", "-x", "--", "--nope"]
    )
    assert (result.exit_code, configs[0].verbosity, configs[0].agent_id) == (0, 4, "-x")


def test_clusterproxy_shows_each_programs_own_help() -> None:
    result = CliRunner().invoke(main, ["server", "--help"])
    assert result.exit_code == 0
    assert "Usage:\n  proxy-server [flags]" in result.output


def test_clusterproxy_exits_as_the_program_does() -> None:
    assert CliRunner().invoke(main, ["server", "--nope"]).exit_code == 1


def test_clusterproxy_lists_its_programs() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for name in ("agent", "demo", "server", "version"):
        assert f"\n  {name} " in output


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_clusterproxy_tells_its_version(args: list[str]) -> None:
    assert CliRunner().invoke(main, args).output.strip().endswith(__version__)


def test_the_version_is_the_packages() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'\nversion = "{__version__}"\n' in pyproject.read_text()


def test_an_unknown_program_is_refused() -> None:
    assert CliRunner().invoke(main, ["nope"]).exit_code == 2
