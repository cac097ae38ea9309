"""The flag set against pflag: the expectations were taken from cobra 1.10.2, pflag 1.0.10, klog 2.140."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.cli.goflags import Flag, FlagSet, Parsed
from clusterproxy.cli.govalues import (
    BOOL,
    DURATION,
    FLOAT32,
    GO_BOOL,
    GO_UINT,
    INT,
    LEVEL,
    MODULE_SPEC,
    SEVERITY,
    STRING,
    STRINGS,
    TRACE_LOCATION,
)
from clusterproxy.errors import ConfigError

FLAGS = FlagSet(
    "program",
    "A program.",
    [
        Flag(name="v", shorthand="v", kind=LEVEL, default=0, usage="Verbosity."),
        Flag(name="server-port", kind=INT, default=8090, usage="Port."),
        Flag(name="qps", kind=FLOAT32, default=0.0, usage="Rate."),
        Flag(name="mode", kind=STRING, default="grpc", usage="Mode."),
        Flag(name="name", kind=STRING, default="", usage="Name."),
        Flag(name="profile", kind=BOOL, default=False, usage="Profile."),
        Flag(name="time", kind=DURATION, default=3600.0, usage="Time."),
        Flag(name="suites", kind=STRINGS, default=(), usage="Suites."),
        Flag(name="list", kind=STRINGS, default=("a", "b"), usage="List."),
        Flag(name="old", kind=BOOL, default=True, usage="Old.", deprecated="do not."),
        Flag(name="other-mode", kind=STRING, default="", usage="", hidden=True, alias_of="mode"),
        Flag(name="logtostderr", kind=GO_BOOL, default=True, usage="Log."),
        Flag(name="size", kind=GO_UINT, default=1800, usage="Size."),
        Flag(name="threshold", kind=SEVERITY, default=2, usage="Threshold."),
        Flag(name="vmodule", kind=MODULE_SPEC, default="", usage="Modules."),
        Flag(name="trace", kind=TRACE_LOCATION, default="", usage="Trace."),
    ],
)


def parse(*args: str) -> Parsed:
    return FLAGS.parse(args)


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--server-port=1"], "server-port", 1),
        (["--server-port", "1"], "server-port", 1),
        (["--server-port", "-1"], "server-port", -1),
        (["--server-port=+1"], "server-port", 1),
        (["--server-port=0x1F"], "server-port", 31),
        (["--server-port=0b11"], "server-port", 3),
        (["--server-port=0o17"], "server-port", 15),
        (["--server-port=010"], "server-port", 8),
        (["--server-port=1_000"], "server-port", 1000),
        (["--server-port=-9223372036854775808"], "server-port", -(2**63)),
        (["--server_port=1"], "server-port", 1),
        (["--server-port=1", "--server-port=2"], "server-port", 2),
        (["--mode="], "mode", ""),
        (["--mode", ""], "mode", ""),
        (["--mode=a=b"], "mode", "a=b"),
        (["--mode", "--v=3"], "mode", "--v=3"),
        (["--mode", "--"], "mode", "--"),
        (["--other-mode=x"], "mode", "x"),
        (["--other-mode=x", "--mode=y"], "mode", "y"),
        (["--profile"], "profile", True),
        (["--profile", "false"], "profile", True),
        *(
            (["--profile=" + text], "profile", True)
            for text in ("1", "t", "T", "TRUE", "true", "True")
        ),
        *(
            (["--profile", "--profile=" + text], "profile", False)
            for text in ("0", "f", "F", "FALSE", "false", "False")
        ),
        (["--logtostderr=false"], "logtostderr", False),
        (["--qps=3.5"], "qps", 3.5),
        (["--qps=-.5e1"], "qps", -5.0),
        (["--qps=INF"], "qps", math.inf),
        (["--time=1.5h"], "time", 5400.0),
        (["--time=300ms"], "time", 0.3),
        (["--time=0"], "time", 0.0),
        (["--suites=a,b", "--suites", "c"], "suites", ("a", "b", "c")),
        (["--suites=a", "--suites="], "suites", ("a",)),
        (["--suites=a,,b, c"], "suites", ("a", "", "b", " c")),
        (['--suites="a,b",c'], "suites", ("a,b", "c")),
        (["--suites=a,b\nc"], "suites", ("a", "b")),
        (["--list=c"], "list", ("c",)),
        (["--list="], "list", ()),
        (["-v", "4"], "v", 4),
        (["-v4"], "v", 4),
        (["-v=4"], "v", 4),
        (["--v=-4"], "v", -4),
        (["-hv4"], "v", 4),
        (["-h"], "help", True),
        (["--help"], "help", True),
        (["-h=false"], "help", False),
        (["--size=0x10"], "size", 16),
        (["--size=18446744073709551615"], "size", 2**64 - 1),
        (["--threshold=info"], "threshold", 0),
        (["--threshold=9"], "threshold", 9),
        (["--vmodule=a=1,,b*=2"], "vmodule", "a=1,,b*=2"),
        (["--trace="], "trace", ""),
        (["--trace=x.go:3"], "trace", "x.go:3"),
        ([], "mode", "grpc"),
        (["--", "--mode=x"], "mode", "grpc"),
    ],
)
def test_spellings(args: list[str], name: str, value: Any) -> None:
    assert parse(*args).values[name] == value


NOT_INT = 'strconv.ParseInt: parsing "{0}": invalid syntax'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["--no_pe=3"], "unknown flag: --no_pe"),
        (["--=x"], "bad flag syntax: --=x"),
        (["---x"], "bad flag syntax: ---x"),
        (["-x"], "unknown shorthand flag: 'x' in -x"),
        (["-x=3"], "unknown shorthand flag: 'x' in -x=3"),
        (["-hx"], "unknown shorthand flag: 'x' in -x"),
        (["--server-port"], "flag needs an argument: --server-port"),
        (["--server_port"], "flag needs an argument: --server_port"),
        (["-v"], "flag needs an argument: 'v' in -v"),
        (["-v="], 'invalid argument "=" for "-v, --v" flag: ' + NOT_INT.format("=")),
        (["-vx"], 'invalid argument "x" for "-v, --v" flag: ' + NOT_INT.format("x")),
        (["--v=0x10"], 'invalid argument "0x10" for "-v, --v" flag: ' + NOT_INT.format("0x10")),
        (
            ["--v=2147483648"],
            (
                'invalid argument "2147483648" for "-v, --v" flag: '
                'strconv.ParseInt: parsing "2147483648": value out of range'
            ),
        ),
        *(
            (
                [f"--server-port={text}"],
                f'invalid argument "{text}" for "--server-port" flag: ' + NOT_INT.format(text),
            )
            for text in ("", "x", " 3", "08", "1__0", "_1", "1_", "1.5", "1e3", "٣")
        ),
        (
            ["--server-port=9223372036854775808"],
            (
                'invalid argument "9223372036854775808" for "--server-port" flag: '
                'strconv.ParseInt: parsing "9223372036854775808": value out of range'
            ),
        ),
        (
            ['--server-port=a\udcff"é\n'],
            (
                r'invalid argument "a\xff\"é\n" for "--server-port" flag: '
                r'strconv.ParseInt: parsing "a\xff\"é\n": invalid syntax'
            ),
        ),
        (
            ["--qps=x"],
            'invalid argument "x" for "--qps" flag: strconv.ParseFloat: parsing "x": invalid syntax',
        ),
        (
            ["--qps=1e39"],
            (
                'invalid argument "1e39" for "--qps" flag: '
                'strconv.ParseFloat: parsing "1e39": value out of range'
            ),
        ),
        (
            ["--profile=yes"],
            (
                'invalid argument "yes" for "--profile" flag: '
                'strconv.ParseBool: parsing "yes": invalid syntax'
            ),
        ),
        (
            ["--help=x"],
            'invalid argument "x" for "-h, --help" flag: strconv.ParseBool: parsing "x": invalid syntax',
        ),
        (
            ["--time=1"],
            'invalid argument "1" for "--time" flag: time: missing unit in duration "1"',
        ),
        (["--logtostderr="], 'invalid argument "" for "--logtostderr" flag: parse error'),
        (["--size=-1"], 'invalid argument "-1" for "--size" flag: parse error'),
        (
            ["--size=18446744073709551616"],
            'invalid argument "18446744073709551616" for "--size" flag: value out of range',
        ),
        (
            ["--threshold=bad"],
            'invalid argument "bad" for "--threshold" flag: ' + NOT_INT.format("bad"),
        ),
        *(
            (
                [f"--vmodule={text}"],
                (
                    f'invalid argument "{text}" for "--vmodule" flag: '
                    "syntax error: expect comma-separated list of filename=N"
                ),
            )
            for text in ("x", "x=y", "=3", "x=", "x=1=2")
        ),
        (
            ["--vmodule=x=-1"],
            'invalid argument "x=-1" for "--vmodule" flag: negative value for vmodule level',
        ),
        *(
            (
                [f"--trace={text}"],
                f'invalid argument "{text}" for "--trace" flag: syntax error: expect file.go:234',
            )
            for text in ("x", "x:3", "x.go:y", "x.go:1:2")
        ),
        (
            ["--trace=x.go:0"],
            'invalid argument "x.go:0" for "--trace" flag: negative or zero value for level',
        ),
        # The first mistake counts, even after a call for help.
        (["--help", "--nope", "--mode"], "unknown flag: --nope"),
    ],
)
def test_mistakes_in_pflags_words(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    assert caught.value.message == message


def test_a_broken_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--suites.*parse error on line 1"):
        parse('--suites="a')


def test_other_arguments_are_set_aside() -> None:
    assert parse("a", "-", "--profile", "b", "", "--", "--c", "-v").arguments == (
        "a",
        "-",
        "b",
        "",
        "--c",
        "-v",
    )


def test_what_was_given_is_told_from_defaults() -> None:
    assert parse("--mode=grpc", "-v0", "--other_mode=x").given == {"mode", "v", "other-mode"}
    assert parse().given == set()


@given(
    st.lists(
        st.text(alphabet='-=v4hx,"_é\udcff\n', max_size=6) | st.sampled_from(["--mode", "--suites"])
    )
)
def test_any_command_line_is_read_or_refused(args: list[str]) -> None:
    with suppress(ConfigError):
        assert parse(*args).values.keys() >= {"mode", "suites", "help"}


def test_usage_is_laid_out_as_pflags() -> None:
    assert FLAGS.help() == (
        "A program.\n"
        "\n"
        "Usage:\n"
        "  program [flags]\n"
        "\n"
        "Flags:\n"
        "  -h, --help                  help for program\n"
        "      --list strings          List. (default [a,b])\n"
        "      --logtostderr           Log. (default true)\n"
        '      --mode string           Mode. (default "grpc")\n'
        "      --name string           Name.\n"
        "      --profile               Profile.\n"
        "      --qps float32           Rate.\n"
        "      --server-port int       Port. (default 8090)\n"
        "      --size uint             Size. (default 1800)\n"
        "      --suites strings        Suites.\n"
        "      --threshold severity    Threshold. (default 2)\n"
        "      --time duration         Time. (default 1h0m0s)\n"
        "      --trace traceLocation   Trace.\n"
        "  -v, --v Level               Verbosity.\n"
        "      --vmodule moduleSpec    Modules.\n"
    )
