from __future__ import annotations

import datetime as dt
import logging
import os
import ssl
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from clusterproxy.errors import ConfigError
from clusterproxy.transport.reload import ReloadingContext, read_not_after
from clusterproxy.transport.tls import server_context

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock


def write_pair(directory: Path, *, not_after: dt.datetime | None = None) -> None:
    directory.mkdir(exist_ok=True)
    leaf = trustme.CA().issue_cert("proxy.example", not_after=not_after)
    (directory / "tls.key").write_bytes(leaf.private_key_pem.bytes())
    (directory / "tls.crt").write_bytes(leaf.cert_chain_pems[0].bytes())


class Watched:
    """A reloading context over the pair in *directory*, and what it reported."""

    def __init__(self, directory: Path) -> None:
        self.cert, self.key = str(directory / "tls.crt"), str(directory / "tls.key")
        self.results: list[str] = []
        self.made = 0
        self.broken = ""
        self.context = ReloadingContext(
            self._make,
            [self.cert, self.key],
            certificate=self.cert,
            on_reload=self.results.append,
        )

    def _make(self) -> ssl.SSLContext:
        self.made += 1
        if self.broken:
            raise ConfigError("cert", self.broken)
        return server_context(
            cert=self.cert, key=self.key, client_ca=None, min_version="", cipher_suites=[], alpn=[]
        )


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    directory = tmp_path / "pair"
    write_pair(directory)
    return directory


def test_nothing_changed(pair: Path) -> None:
    watched = Watched(pair)
    before = watched.context.current()
    watched.context.check()
    assert watched.context.current() is before
    assert (watched.made, watched.results) == (1, [])


def test_rewritten_in_place(pair: Path) -> None:
    watched = Watched(pair)
    before = watched.context.current()
    write_pair(pair)
    watched.context.check()
    assert watched.context.current() is not before
    assert watched.results == ["ok"]
    watched.context.check()
    assert watched.results == ["ok"]


def test_same_size_and_inode_but_written_again(pair: Path) -> None:
    watched = Watched(pair)
    path = pair / "tls.crt"
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    watched.context.check()
    assert watched.results == ["ok"]


def test_the_link_swap_of_kubernetes(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    write_pair(volume / "..first")
    write_pair(volume / "..second")
    (volume / "..data").symlink_to("..first")
    for name in ("tls.crt", "tls.key"):
        (volume / name).symlink_to(f"..data/{name}")
        # Even when size and time of both versions are equal.
        for version in ("..first", "..second"):
            os.utime(volume / version / name, (1, 1))
    watched = Watched(volume)
    before = watched.context.current()
    (volume / "..data_tmp").symlink_to("..second")
    (volume / "..data_tmp").rename(volume / "..data")
    watched.context.check()
    assert watched.context.current() is not before
    assert watched.results == ["ok"]


def test_half_a_pair_is_tried_again(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pair(tmp_path / "new")
    watched = Watched(pair)
    before = watched.context.current()
    (pair / "tls.crt").write_bytes((tmp_path / "new/tls.crt").read_bytes())
    watched.context.check()
    watched.context.check()
    assert watched.context.current() is before
    assert watched.results == ["error", "error"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not belong to certificate" in caplog.text
    (pair / "tls.key").write_bytes((tmp_path / "new/tls.key").read_bytes())
    watched.context.check()
    assert watched.context.current() is not before
    assert watched.results[-1] == "ok"


def test_each_failure_is_logged_once(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watched = Watched(pair)
    key = (pair / "tls.key").read_bytes()
    for content in (b"", b"", None, None, b""):
        if content is None:
            (pair / "tls.key").unlink(missing_ok=True)
        else:
            (pair / "tls.key").write_bytes(content)
        watched.context.check()
    assert watched.results == ["error"] * 5
    assert len(caplog.records) == 3
    assert "tls.key: No such file or directory" in caplog.records[1].getMessage()
    (pair / "tls.key").write_bytes(key)
    watched.context.check()
    assert watched.results[-1] == "ok"
    (pair / "tls.key").write_bytes(b"")
    watched.context.check()
    assert len(caplog.records) == 4


def test_back_to_what_was_loaded(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(pair)
    for _ in range(2):
        (pair / "tls.key").rename(pair / "away")
        watched.context.check()
        (pair / "away").rename(pair / "tls.key")
        watched.context.check()
    assert watched.results == ["error", "error"]
    assert watched.made == 3
    # A failure that went away and came back is told again.
    assert len(caplog.records) == 2


def test_broken_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Watched(tmp_path / "nothing")


def test_without_a_callback(pair: Path) -> None:
    contexts = iter([ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2)])
    context = ReloadingContext(lambda: next(contexts), [str(pair / "tls.crt")])
    before = context.current()
    write_pair(pair)
    context.check()
    assert context.current() is not before
    assert context.not_after() is None


async def test_watch_looks_at_every_interval(pair: Path, autojump_clock: MockClock) -> None:
    watched = Watched(pair)
    before = watched.context.current()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.context.watch, 10.0)
        await trio.sleep(1)
        write_pair(pair)
        await trio.sleep(8.9)
        assert watched.context.current() is before
        await trio.sleep(0.2)
        assert watched.context.current() is not before
        (pair / "tls.crt").unlink()
        await trio.sleep(20)
        assert watched.results == ["ok", "error", "error"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("year", [2049, 2050, 2120])
def test_expiry(tmp_path: Path, year: int) -> None:
    """UTCTime ends in 2049, GeneralizedTime takes over."""
    ends = dt.datetime(year, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    write_pair(tmp_path / "pair", not_after=ends)
    watched = Watched(tmp_path / "pair")
    assert watched.context.not_after() == ends.timestamp()


def test_expiry_follows_a_reload(pair: Path) -> None:
    watched = Watched(pair)
    ends = dt.datetime(2040, 1, 1, tzinfo=dt.UTC)
    write_pair(pair, not_after=ends)
    assert watched.context.not_after() != ends.timestamp()
    watched.context.check()
    assert watched.context.not_after() == ends.timestamp()


def test_expiry_of_what_is_no_certificate(pair: Path, tmp_path: Path) -> None:
    good = (pair / "tls.crt").read_text()
    der = ssl.PEM_cert_to_DER_cert(good)
    path = tmp_path / "x.pem"
    assert read_not_after(str(path)) is None
    assert read_not_after(str(pair / "tls.crt")) is not None
    for content in (
        "",
        good.replace("-----END", "-----ENT"),
        ssl.DER_cert_to_PEM_cert(b"\x31" + der[1:]),
        *(ssl.DER_cert_to_PEM_cert(der[:length]) for length in range(1, 100)),
    ):
        path.write_text(content)
        assert read_not_after(str(path)) is None


def test_expiry_of_an_old_certificate_with_text_around_it(pair: Path, tmp_path: Path) -> None:
    write_pair(pair, not_after=dt.datetime(2040, 1, 1, tzinfo=dt.UTC))
    # A two-digit year from 50 on is one of the last century (RFC 5280 section 4.1.2.5.1).
    der = ssl.PEM_cert_to_DER_cert((pair / "tls.crt").read_text())
    begin = der.index(b"\x17\x0d") + 15
    assert der[begin : begin + 2] == b"\x17\x0d"
    old = der[:begin] + b"\x17\x0d991231235959Z" + der[begin + 15 :]
    path = tmp_path / "old.pem"
    path.write_text(f"Subject: Müller\n{ssl.DER_cert_to_PEM_cert(old)}", encoding="latin-1")
    ends = dt.datetime(1999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
    assert read_not_after(str(path)) == ends.timestamp()


def test_a_reload_for_another_reason(pair: Path) -> None:
    watched = Watched(pair)
    before = watched.context.current()
    watched.context.reload()
    assert watched.context.current() is not before
    assert watched.results == ["ok"]
    # It went wrong for the moment: tried again, though no file has changed.
    watched.broken = "no"
    watched.context.reload()
    watched.broken = ""
    watched.context.check()
    watched.context.check()
    assert watched.results == ["ok", "error", "ok"]
