"""The TLS profile of a listener: known before it opens, followed while it is open."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import trio
from played_config_maps import ConfigMaps
from trio.testing import wait_all_tasks_blocked

from clusterproxy.errors import ConfigError, Forbidden
from clusterproxy.kube.tls_profile import CONFIG_MAP, TlsProfile
from clusterproxy.kube.tls_profile_watch import ProfileWatch

if TYPE_CHECKING:
    from trio.testing import MockClock

TLS13 = {"minTLSVersion": "VersionTLS13", "cipherSuites": "TLS_AES_128_GCM_SHA256,unknown"}
PROFILE = TlsProfile("VersionTLS13", ("TLS_AES_128_GCM_SHA256",))


class Listener:
    def __init__(self) -> None:
        self.config_maps = ConfigMaps()
        self.changes: list[TlsProfile | None] = []
        self.watch = ProfileWatch(
            self.config_maps.api(), "ns", lambda: self.changes.append(self.watch.profile)
        )


async def test_none_then_one_then_none(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    it = Listener()
    async with trio.open_nursery() as nursery:
        await it.watch.start(nursery)
        assert it.watch.profile == TlsProfile()
        it.config_maps.put(CONFIG_MAP, data=TLS13)
        await wait_all_tasks_blocked()
        assert it.watch.profile == PROFILE
        assert 'cipher suite "unknown" is unknown and left out' in caplog.text
        # What is wrong now does not undo what was right.
        it.config_maps.put(CONFIG_MAP, data={"minTLSVersion": "x"})
        await wait_all_tasks_blocked()
        assert it.watch.profile == PROFILE
        assert "minTLSVersion" in it.watch.problem
        it.config_maps.remove(CONFIG_MAP)
        await wait_all_tasks_blocked()
        assert (it.watch.profile, it.watch.problem) == (TlsProfile(), "")
        nursery.cancel_scope.cancel()
    assert len(it.changes) == 4


async def test_wrong_from_the_beginning(autojump_clock: MockClock) -> None:
    it = Listener()
    it.config_maps.put(CONFIG_MAP, data={"minTLSVersion": "x"})
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await it.watch.start(nursery)
    assert caught.group_contains(ConfigError, match="minTLSVersion")


async def test_it_cannot_be_read(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    it = Listener()
    it.config_maps.failure = Forbidden("configmaps is forbidden", status=403)
    it.config_maps.put(CONFIG_MAP, data=TLS13)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await it.watch.start(nursery)
        assert trio.current_time() - began == pytest.approx(5)
        assert it.watch.profile is None
        assert "the defaults hold until it can be read: ConfigMap ns/ocm-tls-profile" in caplog.text
        assert [r.levelno for r in caplog.records if "defaults" in r.message] == [logging.WARNING]
        it.config_maps.failure = None
        await trio.sleep(30)
        assert it.changes == [PROFILE]
        nursery.cancel_scope.cancel()
