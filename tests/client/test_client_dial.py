"""Dials through a scripted server: rows C01 to C03, C07 to C11 and C13 to C17 of the conformance list."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest
import trio
from harness import dial_ok, settle, values
from scripted_proxy import Connector, patch_connector, scripted

from clusterproxy import (
    ConfigError,
    ConnectCause,
    ConnectError,
    DialCause,
    DialError,
    DialReason,
    HalfCloseableTunnelStream,
    Hop,
    open_tunnel,
)
from clusterproxy.grpc import Status
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.server import RpcServer
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    Packet,
)


async def test_first_packet_and_states() -> None:
    """C01: DIAL_REQ with protocol, address and a random number; created, dialing, ok."""
    async with scripted() as world:
        assert world.states == {}
        dial, request = await world.start_dial("cluster1:443")
        assert (request.protocol, request.address) == ("tcp", "cluster1:443")
        assert 0 <= request.random < 1 << 63
        assert world.states == {"dialing": 1}
        assert not dial.done.is_set()
        world.peer.send(dial_ok(7, request.random))
        await settle()
        assert world.states == {"ok": 1}
        assert isinstance(dial.stream, HalfCloseableTunnelStream)
        assert dial.stream.connect_id == 7
        assert dial.stream.remote_address == ("cluster1", 443)
        assert world.packets("from_client") == {"DIAL_REQ": 1, "DATA": 0}
        assert world.packets("to_client") == {"DIAL_RSP": 1, "DATA": 0}


async def test_request_headers() -> None:
    async with scripted(user_agent="tool/1") as world:
        await world.start_dial()
        assert world.peer.user_agent.startswith("tool/1 clusterproxy/")
        assert world.peer.metadata["clusterproxy-extensions"] == ["1"]


async def test_answer_before_the_send_returns() -> None:
    """C02: an answer in the same batch as everything else is no race."""
    async with scripted() as world:
        for _ in range(10):
            dial, request = await world.start_dial()
            world.peer.send(dial_ok(1, request.random), Data(connect_id=1, data=b"greeting"))
            await settle()
            assert dial.stream is not None
            assert await dial.stream.receive_some() == b"greeting"


async def test_single_use_is_dialled_once() -> None:
    """C03: a second dial fails, and the first goes on."""
    async with scripted(reusable=False) as world:
        stream, peer = await world.connect()
        with pytest.raises(DialError, match="single-use dialer already dialed") as caught:
            await world.tunnel.dial("target:80")
        assert caught.value.reason is DialReason.TUNNEL_STARTED
        assert len(world.peers) == 1
        peer.send(Data(connect_id=1, data=b"still there"))
        assert await stream.receive_some() == b"still there"
        assert world.failures == {"tunnelstarted": 1}


async def test_single_use_ends_with_its_stream() -> None:
    async with scripted(reusable=False) as world:
        stream, _ = await world.connect()
        assert world.states == {"ok": 1}
        stream.abort()
        await settle()
        assert world.tunnel.closed
        with trio.fail_after(1):
            await world.tunnel.wait_closed()


@pytest.mark.parametrize(
    ("error", "cause", "text"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), ConnectCause.REFUSED, "is it running"),
        (FileNotFoundError(errno.ENOENT, "x"), ConnectCause.SOCKET, "no such socket"),
        (OSError(errno.EHOSTUNREACH, "x"), ConnectCause.UNREACHABLE, "does not reach"),
        (OSError("odd"), ConnectCause.OTHER, "odd"),
    ],
)
async def test_cannot_connect(error: OSError, cause: ConnectCause, text: str) -> None:
    """C07: an error that names the server and the cure, no tunnel, nothing left."""
    async with trio.open_nursery() as nursery:
        connector = Connector(nursery, RpcServer({}, limits=Http2Limits()).serve)
        connector.errors.append(error)
        with patch_connector(connector), pytest.raises(ConnectError, match=text) as caught:
            async with open_tunnel("/scripted"):
                pytest.fail("there is no tunnel")
        assert caught.value.cause is cause
        assert caught.value.hop is Hop.SERVER
        assert "unix:///scripted" in str(caught.value)


@pytest.mark.parametrize("reusable", [True, False])
async def test_closed_before_dialling(reusable: bool) -> None:
    """C08, C15: a dial after the end of the tunnel."""
    async with scripted(reusable=reusable) as world:
        await world.tunnel.aclose()
        with pytest.raises(DialError, match="tunnel closed") as caught:
            await world.tunnel.dial("target:80")
        assert caught.value.reason is DialReason.TUNNEL_CLOSED
        assert world.peers == []
        assert world.failures == {"tunnelclosed": 1}


async def test_cancelled_while_pending() -> None:
    """C09: the server is told, the stream ends, and the dial counts as ended by its context."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        dial.scope.cancel()
        await settle()
        assert dial.scope.cancelled_caught
        await world.peer.expect(CloseDial(request.random))
        assert world.peer.half_closed or world.peer.closed_with is not None
        assert world.states == {}
        assert world.failures == {"context": 1}


async def test_deadline_while_pending(autojump_clock: trio.testing.MockClock) -> None:
    """C09 with a deadline: the exception is trio's."""
    async with scripted() as world:
        with pytest.raises(trio.TooSlowError), trio.fail_after(2):
            await world.tunnel.dial("target:80")
        assert isinstance(await world.peer.next(), DialRequest)
        assert isinstance(await world.peer.next(), CloseDial)
        assert world.failures == {"context": 1}


async def test_cancelled_in_the_moment_of_the_answer() -> None:
    """C09: the connection that nobody gets is closed."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        world.peer.send(dial_ok(1, request.random))
        # The answer is there before the dial's task runs again.
        dial.scope.cancel()
        await settle()
        if dial.stream is None:
            assert world.states == {}
            assert world.peer.closed_with is not None or world.peer.half_closed


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("answer", ["refused", "taken back"])
async def test_cancelled_in_the_moment_of_a_refusal(
    answer: str, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """C09: whichever comes first, the call is ended once, and nobody hears of anything but the cancellation."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        peer = world.peer
        packet = (
            DialResponse(error="connection refused", random=request.random)
            if answer == "refused"
            else CloseDial(request.random)
        )
        if late:
            # It crosses what the client says.
            peer.call.on_half_close = lambda: None
            dial.scope.cancel()
            await settle()
            peer.send(packet)
        else:
            (call,) = world.tunnel._calls  # type: ignore[attr-defined]
            # The task has been told of its cancellation, and does not run before the answer is read.
            dial.scope.cancel()
            call._on_packet(Packet.of(packet))
        await settle()
        assert dial.error is None
        assert dial.scope.cancelled_caught
        peer.finish()
        await settle()
        assert world.states == {}
        assert world.failures == {"context": 1}
        assert not caplog.records
        # The connection is as good as before.
        await world.connect()
        assert len(world.connector.transports) == 1


@pytest.mark.parametrize(
    ("text", "hop", "cause"),
    [
        ("No agent available", Hop.SERVER, DialCause.NO_AGENT),
        ("timed out waiting for backend dial", Hop.AGENT, DialCause.TIMEOUT),
        ("dial tcp 127.0.0.1:1: connect: connection refused", Hop.SERVICE, DialCause.REFUSED),
        (
            "dial tcp: lookup x.invalid on 10.0.0.10:53: no such host",
            Hop.AGENT,
            DialCause.DNS,
        ),
        ("dial tcp: lookup x on 10.0.0.10:53: i/o timeout", Hop.AGENT, DialCause.DNS),
        ("dial tcp 10.0.0.1:80: i/o timeout", Hop.SERVICE, DialCause.TIMEOUT),
        ("dial tcp 10.0.0.1:80: connect: no route to host", Hop.SERVICE, DialCause.UNREACHABLE),
        ("dial tcp: address x: missing port in address", Hop.CLIENT, DialCause.OTHER),
        ("dial tcp 10.0.0.1:80: socket: too many open files", Hop.AGENT, DialCause.OTHER),
        ("destination not allowed by policy", Hop.AGENT, DialCause.POLICY),
        ("something new", Hop.AGENT, DialCause.OTHER),
    ],
)
async def test_refused(text: str, hop: Hop, cause: DialCause) -> None:
    """C10: the agent's or the server's text, where it failed and of what; reason endpoint."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        world.peer.send(DialResponse(error=text, random=request.random))
        await settle()
        error = dial.error
        assert isinstance(error, DialError)
        assert (error.reason, error.hop, error.cause) == (DialReason.ENDPOINT, hop, cause)
        assert error.message == text
        assert error.address == "target:80"
        assert str(error).startswith(f"target:80: failed at the {hop}: {text}")
        assert world.failures == {"endpoint": 1}
        assert world.states == {}


async def test_dial_closed() -> None:
    """C11: the agent was lost while the dial was pending."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        world.peer.send(CloseDial(request.random + 1))
        await settle()
        assert not dial.done.is_set()
        world.peer.send(CloseDial(request.random))
        await settle()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.DIAL_CLOSED
        assert dial.error.message == "dial closed"
        assert world.states == {}


async def test_stream_ends_while_pending() -> None:
    """The server ends the stream, orderly or not: reason tunnelclosed."""
    async with scripted() as world:
        dial, _ = await world.start_dial()
        world.peer.finish()
        await settle()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        dial, _ = await world.start_dial()
        world.peer.call.abort(Status.UNKNOWN, "out of order")
        await settle()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        assert "out of order" in str(dial.error)
        errors = {
            labels: cell.value
            for labels, cell in world.metrics.stream_errors_total.children.items()
        }
        assert errors == {("to_client", "Unknown", "Unknown"): 1}


async def test_nobody_answers(autojump_clock: trio.testing.MockClock) -> None:
    """The backstop of 30 s: reason timeout, and the server is told."""
    async with scripted() as world:
        start = trio.current_time()
        with pytest.raises(DialError, match="dial timeout, backstop") as caught:
            await world.tunnel.dial("target:80")
        assert trio.current_time() - start == pytest.approx(30)
        assert caught.value.reason is DialReason.TIMEOUT
        assert isinstance(await world.peer.next(), DialRequest)
        assert isinstance(await world.peer.next(), CloseDial)
        assert world.failures == {"timeout": 1}


async def test_cancelled_while_connecting(autojump_clock: trio.testing.MockClock) -> None:
    """C13: a dial's deadline holds while there is no connection yet; nothing is left of it."""
    async with scripted() as world:
        world.connector.transports[0].close()
        await settle()
        world.connector.errors += [ConnectionRefusedError(errno.ECONNREFUSED, "x")] * 9
        for _ in range(5):
            with pytest.raises(DialError):
                await world.tunnel.dial("target:80")
        # Now it would wait for longer than that.
        with trio.move_on_after(0.1) as scope:
            await world.tunnel.dial("target:80")
        assert scope.cancelled_caught
        assert world.failures == {"streamsetup": 5, "context": 1}


async def test_other_protocol() -> None:
    """C14: no stream is opened for it."""
    async with scripted() as world:
        with pytest.raises(DialError, match="protocol not supported") as caught:
            await world.tunnel.dial("target:80", protocol="udp")
        assert caught.value.reason is DialReason.UNKNOWN
        assert world.peers == []


@pytest.mark.parametrize("address", ["", "a b:80", "a\r\nHost: b:80", "größe:80", "x" * 1025])
async def test_no_address(address: str) -> None:
    """What could break a line of a request, or is no name, goes nowhere."""
    async with scripted() as world:
        with pytest.raises(DialError, match="no address"):
            await world.tunnel.dial(address)
        assert world.peers == []


async def test_stream_cannot_be_opened(autojump_clock: trio.testing.MockClock) -> None:
    """C17: the server is lost and does not come back; reason streamsetup, caused by the ConnectError."""
    async with scripted() as world:
        world.connector.transports[0].close()
        await settle()
        world.connector.errors.append(ConnectionRefusedError(errno.ECONNREFUSED, "x"))
        with pytest.raises(DialError, match="proxy server unix:///scripted") as caught:
            await world.tunnel.dial("target:80")
        assert caught.value.reason is DialReason.STREAM_SETUP
        assert caught.value.hop is Hop.SERVER
        assert caught.value.cause is DialCause.REFUSED
        assert isinstance(caught.value.__cause__, ConnectError)
        # The next dial connects again, but not at once.
        await trio.sleep(1)
        stream, _ = await world.connect()
        assert stream.connect_id == 1


async def test_foreign_data_is_answered() -> None:
    """DATA of a connection that is not ours: CLOSE_REQ, as upstream; ours goes on."""
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(Data(connect_id=9, data=b"?"), Data(connect_id=1, data=b"ours"))
        assert await stream.receive_some() == b"ours"
        await peer.expect(CloseRequest(9))


async def test_second_answer_ends_the_stream() -> None:
    """As upstream: a DIAL_RSP that nobody waits for ends the tunnel."""
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(dial_ok(2, 12345))
        await settle()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert peer.closed_with is not None


async def test_undecodable_message_ends_the_stream() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send_message(b"\xff\xff\xff")
        await settle()
        with pytest.raises(trio.BrokenResourceError, match="undecodable"):
            await stream.receive_some()


async def test_unknown_packets_are_ignored() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send_message(b"\x08\x63")  # type 99
        peer.send_message(b"")  # DIAL_REQ without payload
        peer.send_message(b"\x08\x01")  # DIAL_RSP without payload
        peer.send(Data(connect_id=1, data=b"on"))
        assert await stream.receive_some() == b"on"
        assert not values(world.metrics.rejected_packets_total)


async def test_exceptions_of_the_block_are_in_no_group() -> None:
    async with trio.open_nursery() as nursery:
        rpc = RpcServer({}, limits=Http2Limits())
        with patch_connector(Connector(nursery, rpc.serve)):
            with pytest.raises(ZeroDivisionError):
                async with open_tunnel("/scripted"):
                    raise ZeroDivisionError
            with trio.CancelScope() as scope:
                async with open_tunnel("/scripted"):
                    scope.cancel()
                    await trio.sleep_forever()
            assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
async def test_exceptions_of_the_block_survive_a_cancellation(
    failure: type[BaseException],
) -> None:
    async def fail_when_cancelled() -> None:
        with trio.CancelScope() as scope:
            async with open_tunnel("/scripted"):
                scope.cancel()
                raise failure

    async with trio.open_nursery() as nursery:
        rpc = RpcServer({}, limits=Http2Limits())
        with patch_connector(Connector(nursery, rpc.serve)):
            with pytest.raises(failure):
                await fail_when_cancelled()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "error",
    [
        DialError(
            DialReason.ENDPOINT, "no", hop=Hop.SERVICE, cause=DialCause.REFUSED, address="a:1"
        ),
        ConnectError("hub:8090", ConnectCause.CA, "not trusted", "look at the CA"),
        ConfigError("server", "no such thing"),
        DecodeError("truncated varint", 3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_pass_from_process_to_process(error: Exception) -> None:
    error.add_note("in a worker")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  our own
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
