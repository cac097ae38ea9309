"""The list of services that users may reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.errors import ConfigError
from clusterproxy.user_server.exposed_services import (
    ExposedService,
    ExposedServices,
    entry_for,
    parse_exposed_services,
)
from clusterproxy.user_server.target import Target

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

PROMETHEUS = ExposedService(
    namespace="monitoring", service="prometheus", port="9090", protocol="https"
)


def parse(**data: Any) -> tuple[ExposedService, ...]:
    return parse_exposed_services({"data": data}).entries


def target(
    namespace: str = "monitoring",
    service: str = "prometheus",
    port: str = "9090",
    proto: str = "https",
) -> Target:
    return Target(
        cluster="c1",
        proto=proto,
        namespace=namespace,
        service=service,
        port=port,
        path=b"/",
        exposed=True,
    )


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("", ()),
        ("# none yet\n", ()),
        ("---\n", ()),
        ("~", ()),
        ("null # none", ()),
        ("[]", ()),
        (
            "- namespace: monitoring\n  service: prometheus\n  port: '9090'\n  protocol: https\n",
            (PROMETHEUS,),
        ),
        (
            "- {namespace: monitoring, service: prometheus, port: 9090, protocol: https}",
            (PROMETHEUS,),
        ),
        (
            "---\n- namespace: a\n  service: b\n- namespace: '1'\n  service: !!str 2\n...\n",
            (
                ExposedService(namespace="a", service="b"),
                ExposedService(namespace="1", service="2"),
            ),
        ),
        # As in Go: whatever the case of a field's name, and null is as good as nothing.
        (
            "- Namespace: a\n  SERVICE: b\n  port: null\n  protocol:\n",
            (ExposedService(namespace="a", service="b"),),
        ),
        ("- namespace: 1\n  service: b\n  port: 0\n", (
            ExposedService(namespace="1", service="b", port="0"),
        )),
        # Without a reference to it an anchor means nothing.
        ("- &a\n  namespace: a\n  service: b\n", (ExposedService(namespace="a", service="b"),)),
    ],
)  # fmt: skip
def test_lists(text: str, entries: tuple[ExposedService, ...]) -> None:
    assert parse(key=text) == entries


def test_the_lists_of_all_keys_count() -> None:
    assert parse(a="- {namespace: a, service: x}", empty="", b="- {namespace: b, service: x}") == (
        ExposedService(namespace="a", service="x"),
        ExposedService(namespace="b", service="x"),
    )


@pytest.mark.parametrize(
    "config_map", [{}, {"data": None}, {"data": {}}, {"binaryData": {"a": "eA=="}}]
)
def test_no_list(config_map: Object) -> None:
    assert parse_exposed_services(config_map).entries == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- service: b", "entry[0]: namespace is required"),
        ("- {namespace: a, service: b}\n- namespace: a", "entry[1]: service is required"),
        ("- {namespace: '', service: b}", "entry[0]: namespace is required"),
        ("- {}", "entry[0]: namespace is required"),
        ("- {namespace: a, service: b, protcol: x}", 'entry[0]: unknown field "protcol"'),
        ("- {namespace: a, service: b, <<: {port: 1}}", 'unknown field "<<"'),
        ("- {namespace: a, service: b, port: 1, port: 2}", 'field "port" is there twice'),
        ("- {namespace: a, service: b, port: 1, Port: 2}", 'field "port" is there twice'),
        ("- {namespace: a, service: true}", 'entry[0]: service: "true" must be in quotes'),
        ("- {namespace: a, service: b, port: 9090.5}", 'port: "9090.5" must be in quotes'),
        ("- {namespace: a, service: b, port: 0x50}", 'port: "0x50" must be in quotes'),
        ("- {namespace: a, service: b, port: 0443}", 'port: "0443" must be in quotes'),
        ("- {namespace: a, service: b, port: !!python/name:os 1}", "port"),
        ("- {namespace: a, service: b, port: [1]}", "entry[0]: port must be text, line 1"),
        ("- {namespace: a, service: {b: c}}", "service must be text"),
        ("- {namespace: &a x, service: *a}", "references (&, *) are not supported"),
        ("- {[a]: b}", "the name of a field must be text"),
        ("- &a {namespace: a, service: b}\n- *a", "line 2; references"),
        ("- a", "an item must have the fields namespace and service, line 1"),
        ("-", "an item must have the fields"),
        ("- [a]", "an item must have the fields"),
        ("namespace: a\nservice: b", "it must be a list"),
        ("a list", "it must be a list"),
        ("[]\n---\n[]", "one list only, line 2"),
        ("null\n---\n- {namespace: a, service: b}", "one list only"),
        ("this: is: not: valid: yaml: [[[", "it must be a list"),
        ("- namespace: b: c: [", "line 1"),
        ("- {namespace: a", "expected"),
        ("- {namespace: a\tb\x07, service: b}", "key"),
        ("- {namespace: \ud800, service: b}", "surrogates"),
        # libyaml has a limit, PyYAML's own parser finds that this is no mapping.
        ("[" * 200_000, "line 1"),
        ("- namespace: " + "[" * 200_000, "line 1"),
        ("- {namespace: a, service: b, " + "x" * 100 + ": c}", "x" * 64 + '..."'),
        (7, "its value is no text"),
        (["a"], "its value is no text"),
    ],
)
def test_mistakes(text: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(fine="- {namespace: a, service: b}", **{"bad-key": text})
    assert caught.value.field == "exposed-services-configmap"
    assert caught.value.message.startswith('key "bad-key": ')
    assert problem in caught.value.message
    assert "\n" not in caught.value.message


def test_a_reference_makes_nothing_larger() -> None:
    bomb = "- &a {namespace: a, service: b}\n" + "- *a\n" * 10
    with pytest.raises(ConfigError, match="references"):
        parse(key=bomb)


@pytest.mark.parametrize(
    ("entry", "asked", "allowed"),
    [
        (PROMETHEUS, target(), True),
        (PROMETHEUS, target(namespace="other"), False),
        (PROMETHEUS, target(service="other"), False),
        (PROMETHEUS, target(service="Prometheus"), False),
        (PROMETHEUS, target(port="8080"), False),
        (PROMETHEUS, target(proto="http"), False),
        (ExposedService(namespace="monitoring", service="prometheus"), target(), True),
        (ExposedService(namespace="monitoring", service="*"), target(), False),
        (
            ExposedService(namespace="monitoring", service="prometheus", port="9090"),
            target(proto="http"),
            True,
        ),
        (
            ExposedService(namespace="monitoring", service="prometheus", protocol="http"),
            target(),
            False,
        ),
    ],
)
def test_matching(entry: ExposedService, asked: Target, allowed: bool) -> None:
    assert entry.matches(asked) is allowed
    other = ExposedService(namespace="a", service="b")
    assert ExposedServices((other, entry, other)).allows(asked) is allowed
    assert not ExposedServices().allows(asked)


NAMES = st.from_regex("[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)


@given(NAMES, NAMES, st.integers(1, 65535).map(str), st.sampled_from(["http", "https"]))
def test_the_entry_that_is_told_exposes_just_that(
    namespace: str, service: str, port: str, proto: str
) -> None:
    asked = target(namespace, service, port, proto)
    line = entry_for(asked)
    assert "\n" not in line
    services = parse_exposed_services({"data": {"key": line}})
    assert services.allows(asked)
    assert services.entries == (
        ExposedService(namespace=namespace, service=service, port=port, protocol=proto),
    )
    assert yaml.safe_load(line)[0] == {
        "namespace": namespace, "service": service, "port": port, "protocol": proto
    }  # fmt: skip


@given(st.text("-{}[]:,&*!'\"\n #ab<~", max_size=60))
def test_any_text_is_a_list_or_a_mistake(text: str) -> None:
    try:
        entries = parse(key=text)
    except ConfigError:
        return
    assert all(entry.namespace and entry.service for entry in entries)
