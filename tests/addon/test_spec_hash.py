from __future__ import annotations

import copy
import hashlib
import json
import subprocess
from typing import Any

import pytest
from go_tools import go_module_program, needs_go
from golden_objects import configuration_object, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.spec_hash import (
    ConfigKey,
    addon_configs_patch,
    config_keys,
    default_configs_patch,
    go_json,
    spec_hash,
)

PROXY = ConfigKey(
    "proxy.open-cluster-management.io", "managedproxyconfigurations", "", "cluster-proxy"
)
DEPLOYMENT = ConfigKey(
    "addon.open-cluster-management.io", "addondeploymentconfigs", "default", "adc"
)
OTHER = ConfigKey("example.com", "things", "", "thing")

CONFIG = {"metadata": {"generation": 7}, "spec": {"agentInstallNamespace": "a<b"}}
HASH = hashlib.sha256(b'{"spec":{"agentInstallNamespace":"a\\u003cb"}}').hexdigest()

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def named(key: ConfigKey, **fields: Any) -> dict[str, Any]:
    desired = {"namespace": key.namespace, "name": key.name}
    return {
        "group": key.group,
        "resource": key.resource,
        "desiredConfig": {name: text for name, text in desired.items() if text},
        **fields,
    }


def in_spec(key: ConfigKey) -> dict[str, Any]:
    reference = named(key)
    return {**reference, **reference.pop("desiredConfig")}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": [1, True, None], "a": {}}, '{"a":{},"b":[1,true,null]}'),
        ("<&>\u2028\u2029/\x7f\"\\\b\f\n\r\t\x01é", '"\\u003c\\u0026\\u003e\\u2028\\u2029/\x7f\\"\\\\\\b\\f\\n\\r\\t\\u0001é"'),
        ("\ud800 a \udfff", '"\ufffd a \ufffd"'),
        ([1.0, 0.5, -0.0, 100.0, 1e16, 123456789012345680000.0], "[1,0.5,-0,100,10000000000000000,123456789012345680000]"),
        ([1e21, 1.5e300, 1e-6, 1e-7, -2.5e-10, 5e-324, 0.1], "[1e+21,1.5e+300,0.000001,1e-7,-2.5e-10,5e-324,0.1]"),
        ([2**63 - 1, 2**63, -(2**63), 2**70], "[9223372036854775807,9223372036854776000,-9223372036854775808,1.1805916207174113e+21]"),
    ],
)  # fmt: skip
def test_json_as_go_writes_it(value: object, text: str) -> None:
    assert go_json(value) == text


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400])
def test_what_is_no_json_number(value: float) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        go_json([value])


@settings(derandomize=True, deadline=None)
@given(JSON)
def test_what_is_written_means_what_was_read(value: object) -> None:
    def plain(each: object) -> object:
        # What fits into no 64 bits is read as a float, and a whole float is written as an integer.
        if isinstance(each, dict):
            return {key: plain(inner) for key, inner in each.items()}
        if isinstance(each, list):
            return [plain(inner) for inner in each]
        return each if isinstance(each, bool) or not isinstance(each, int | float) else float(each)

    assert plain(json.loads(go_json(value))) == plain(value)


def test_what_is_no_json() -> None:
    with pytest.raises(TypeError, match="no JSON: bytes"):
        go_json({"a": [b"x"]})


def test_the_hash_is_of_what_configures() -> None:
    spec = {"spec": {"a": 1}, "more": "x"}
    wanted = hashlib.sha256(b'{"more":"x","spec":{"a":1}}').hexdigest()
    assert (
        spec_hash({"apiVersion": "v1", "kind": "K", "metadata": {"a": 1}, "status": 1, **spec})
        == wanted
    )
    assert spec_hash({}) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.programs
@needs_go
def test_go_says_the_same() -> None:
    lines: list[str] = [json.dumps(configuration_object())]
    values: list[object] = []

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(JSON)
    def collect(value: object) -> None:
        values.append(value)

    collect()
    lines += [json.dumps({"kind": "K", "spec": value, "status": 1}) for value in values]
    # Spellings of numbers that Python does not write.
    lines += [
        f'{{"spec":{number}}}' for number in ("1.0", "-0", "-0.0", "1E3", "12e-1", "1e-7", "0.10")
    ]
    answer = subprocess.run(
        [go_module_program("./cmd/gojson")],
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    # A line feed in a text is escaped, other ends of lines are not.
    answers = answer.stdout.decode().removesuffix("\n").split("\n")
    assert len(answers) == len(lines)
    for line, said in zip(lines, answers, strict=True):
        obj = json.loads(line)
        fields = {"spec": obj["spec"]}
        assert f"{spec_hash(obj)} {go_json(fields)}" == said, line


def test_a_reference_gets_generation_and_hash() -> None:
    # D7
    addon: dict[str, Any] = {
        "metadata": {"uid": "u", "resourceVersion": "5"},
        "spec": {"configs": [in_spec(DEPLOYMENT)]},
        "status": {"configReferences": [named(PROXY), named(DEPLOYMENT, lastObservedGeneration=0), named(OTHER)]},
    }  # fmt: skip
    before = copy.deepcopy(addon)
    assert config_keys(addon) == {PROXY, DEPLOYMENT}
    patch = addon_configs_patch(addon, {PROXY: CONFIG, DEPLOYMENT: CONFIG})
    assert addon == before
    assert patch is not None
    assert patch["metadata"] == {"uid": "u", "resourceVersion": "5"}
    assert patch["status"]["configReferences"] == [
        # Its hash comes from the ClusterManagementAddOn, by way of the hub's add-on manager.
        named(PROXY, lastObservedGeneration=7),
        named(
            DEPLOYMENT,
            lastObservedGeneration=7,
            desiredConfig={"namespace": "default", "name": "adc", "specHash": HASH},
        ),
        named(OTHER),
    ]
    addon["status"].update(patch["status"])
    assert addon_configs_patch(addon, {PROXY: CONFIG, DEPLOYMENT: CONFIG}) is None


def test_a_missing_configuration_changes_nothing() -> None:
    addon = {"spec": {"configs": [in_spec(PROXY)]}, "status": {"configReferences": [named(PROXY)]}}
    assert addon_configs_patch(addon, {}) is None


@pytest.mark.parametrize("field", ["defaultConfigReferences", "defaultconfigReferences"])
def test_the_default_references_get_hashes(field: str) -> None:
    # D7
    progression = {"name": "placement", "configReferences": [named(DEPLOYMENT), named(OTHER)]}
    addon: dict[str, Any] = {
        "metadata": {"resourceVersion": "5"},
        "status": {field: [named(PROXY)], "installProgressions": [progression, {"name": "other"}]},
    }
    assert config_keys(addon) == {PROXY, DEPLOYMENT}
    patch = default_configs_patch(addon, {DEPLOYMENT: CONFIG, PROXY: {}})
    assert patch is not None
    hashed = {"namespace": "default", "name": "adc", "specHash": HASH}
    assert patch["status"] == {
        field: [named(PROXY, desiredConfig={"name": "cluster-proxy", "specHash": spec_hash({})})],
        "installProgressions": [
            {**progression, "configReferences": [named(DEPLOYMENT, desiredConfig=hashed), named(OTHER)]},
            {"name": "other"},
        ],
    }  # fmt: skip
    addon["status"].update(patch["status"])
    assert default_configs_patch(addon, {DEPLOYMENT: CONFIG, PROXY: {}}) is None
    # One that is gone has none.
    gone = default_configs_patch(addon, {DEPLOYMENT: CONFIG})
    assert gone is not None
    assert gone["status"][field][0]["desiredConfig"]["specHash"] == ""


def test_the_golden_references_stay() -> None:
    for situation in ("02-hub-addon", "07-hub-addon"):
        addon = golden(situation)["ManagedClusterAddOn", "cluster-proxy"]
        config = configuration_object()
        config["metadata"]["generation"] = 1
        assert config_keys(addon) == {PROXY}
        assert addon_configs_patch(addon, {PROXY: config}) is None


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(["configReferences", "defaultConfigReferences", "installProgressions"]), JSON | st.lists(st.fixed_dictionaries({"group": st.just(PROXY.group), "resource": st.just(PROXY.resource), "desiredConfig": JSON | st.dictionaries(st.sampled_from(["name", "namespace", "specHash"]), JSON)}))), JSON)  # fmt: skip
def test_references_of_any_shape(status: dict[str, Any], configs: object) -> None:
    for addon in ({"status": status, "spec": {"configs": configs}}, {"status": configs}):
        found = dict.fromkeys(config_keys(addon), CONFIG)
        for patched in (addon_configs_patch, default_configs_patch):
            patch = patched(addon, found)
            if patch is not None:
                after = {**addon, "status": {**status, **patch["status"]}}
                assert patched(after, found) is None
