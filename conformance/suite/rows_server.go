package suite

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	s := func(id string, need Need, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: need, Side: ServerSide, Scripted: true, Run: run})
	}
	s("S01", Must, "no agent", rowNoAgent)
	s("S02", Must, "packets are forwarded unchanged and in order", rowForwarding)
	s("S03", Must, "DATA before a dial", rowDataBeforeDial)
	s("S04", Should, "CLOSE_REQ before a dial", rowCloseBeforeDial)
	s("S05", Should, "mismatched connection IDs", rowMismatch)
	s("S06", Must, "DATA with connectID 0", rowConnectIDZero)
	s("S07", Must, "unknown packet type, DIAL_CLS of an unknown dial", rowUnknownPackets)
	s("S08", Should, "full channel: counted, order kept, no deadlock", rowFullChannel)
	s("S09", Must, "pending dial cancelled", rowCancelPending)
	s("S10", Must, "client vanishes while the dial is pending", rowVanishPending)
	s("S11", Must, "client vanishes when established", rowVanishEstablished)
	s("S12", Must, "the agent's error answer", rowErrorAnswer)
	s("S13", Must, "the agent closes", rowAgentCloses)
	s("S14", Must, "agent's DATA for an unknown connection", rowAgentUnknownData)
	s("S15", Must, "agent stream ends: only its connections end", rowAgentStreamEnds)
	s("S16", Differ, "agent stream ends while a dial is pending", rowAgentEndsPending)
	s("S17", Must, "--backend-dial-timeout, mute agent", rowBackendDialTimeout)
	s("S18", Must, "--backend-dial-timeout, agent that does not read", rowBackendBlocked)
	s("S19", Should, "several dials on one stream", rowSeveralDials)
	s("S20", Differ, "empty message, payload of another type", rowWrongPayload)
	s("S21", Should, "undecodable message", rowUndecodable)
	s("S22", Should, "unknown method, service, content-type", rowUnknownMethods)
	s("S23", Should, "message larger than 4 MiB", rowTooLarge)
	s("S24", Differ, "foreign connectID", rowForeignConnectID)
	s("S26", Must, "percent-encoded :authority over UDS", rowPercentAuthority)
	s("S27", Must, "PING is answered, INITIAL_WINDOW_SIZE is honoured in mid-stream", rowPingAndWindows)
	register(Row{ID: "S28", Title: "target speaks first", Need: Must, Side: ServerSide, Alone: true, Timeout: 120 * time.Second, Run: rowGreetGRPC})
	s("S29", Differ, "colliding connectIDs of two streams of one agent ID", rowCollidingIDs)
}

func rowNoAgent(t *T) {
	s := t.StartServer(ServerOpts{})
	c := s.Client("client")
	c.Send(dialReq(4711, "127.0.0.1:80"))
	c.Want(dialErr(4711, "No agent available"))
	s.WantMetric(1, "dial_failure_count", "reason", "no_agent")
	c.Silence(400 * time.Millisecond)
	c.HalfClose()
	c.WantEnd(codes.OK, "")
}

func rowForwarding(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	req := marshal(dialReq(1<<62+17, "some.host:443"))
	c.SendRaw(req)
	a.WantRaw(req)
	rsp := marshal(dialRsp(1<<62+17, 7))
	a.SendRaw(rsp)
	c.WantRaw(rsp)
	for i, size := range []int{1, 0, 4096, 32740, 1 << 20} {
		up := marshal(data(7, bytes.Repeat([]byte{byte(i)}, size)))
		down := marshal(data(7, bytes.Repeat([]byte{byte(i + 100)}, size)))
		c.SendRaw(up)
		a.SendRaw(down)
		a.WantRaw(up)
		c.WantRaw(down)
	}
	c.Send(data(7, []byte("last")), closeReq(7))
	a.Want(data(7, []byte("last")), closeReq(7))
	a.Send(data(7, []byte("late")), closeRsp(7, ""))
	c.Want(data(7, []byte("late")), closeRsp(7, ""))

	// Not answered: what the client says about a connection it does not have
	// must not reach the agent.
	c = s.Client("second client")
	c.Send(dialReq(42, "some.host:443"))
	a.Want(dialReq(42, "some.host:443"))
	c.Send(data(9, []byte("early")), closeReq(9))
	t.Sleep(200 * time.Millisecond)
	c.HalfClose()
	for {
		p := a.Next()
		if p.Type == pb.PacketType_DIAL_CLS {
			if p.GetCloseDial().GetRandom() != 42 {
				t.Errorf("received %s, want DIAL_CLS{42}", show(p))
			}
			break
		}
		t.ServerDiffers("forwarded %s, though the dial is not answered", show(p))
	}
}

func rowDataBeforeDial(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(data(55, []byte("x")))
	c.Want(closeRsp(55, "backend not initialized"))
	c.Send(dialReq(1, "127.0.0.1:80"), closeReq(55), data(55, nil))
	c.Silence(300 * time.Millisecond)
	a.Silence(100 * time.Millisecond)
	c.HalfClose()
	c.WantEnd(codes.OK, "")
}

func rowCloseBeforeDial(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(closeReq(55))
	c.Want(closeRsp(55, "backend uninitialized"))
	c.Send(dialReq(1, "127.0.0.1:80"))
	a.Accept(3)
	c.Want(dialRsp(1, 3))
	c.Send(data(3, []byte("x")))
	a.Want(data(3, []byte("x")))
}

func rowMismatch(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Establish(a, 100, 1)
	c.Send(data(1, []byte("mine")), data(2, []byte("not mine")))
	a.Want(data(1, []byte("mine")))
	c.WantSet(closeRsp(1, "mismatched connection IDs"), closeRsp(2, "mismatched connection IDs"))
	sawOwn := false
	for _, p := range a.Drain(500 * time.Millisecond) {
		switch {
		case p.Type == pb.PacketType_CLOSE_REQ && p.GetCloseRequest().GetConnectID() == 1:
			sawOwn = true
		case p.Type == pb.PacketType_CLOSE_REQ && p.GetCloseRequest().GetConnectID() == 2:
			t.ServerDiffers("the agent was sent %s for a connection that is not this client's", show(p))
		default:
			t.Errorf("the agent was sent %s", show(p))
		}
	}
	if !sawOwn {
		t.Errorf("the agent was not sent CLOSE_REQ{1}")
	}
}

func rowConnectIDZero(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Establish(a, 100, 1)
	c.Send(data(0, []byte("nobody's")), data(1, []byte("x")))
	a.Want(data(1, []byte("x")))
	a.Send(data(0, []byte("nobody's")), data(1, []byte("y")))
	c.Want(data(1, []byte("y")))
	a.Silence(200 * time.Millisecond)
	c.Silence(10 * time.Millisecond)
}

func rowUnknownPackets(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	unknown := [][]byte{
		{0x08, 9},                            // type 9, no payload
		{0x08, 9, 0x22, 2, 0x08, 5},          // type 9 with a DATA payload
		{0x08, 0x80, 0x80, 0x80, 0x08},       // a large type
		{0x08, 9, 0x9a, 0x06, 1, 0x41},       // an unknown field
		marshal(dialCls(77)),                 // unknown dial
		marshal(drain()),                     // not for this direction
		append([]byte{0x08, 12}, 0xb0, 6, 1), // unknown varint field
	}
	for _, m := range unknown {
		c.SendRaw(m)
	}
	c.Send(dialReq(1, "127.0.0.1:80"))
	a.Accept(3)
	c.Want(dialRsp(1, 3))
	for _, m := range unknown {
		c.SendRaw(m)
	}
	for _, m := range unknown[:4] {
		a.SendRaw(m)
	}
	c.Send(data(3, []byte("x")))
	a.Want(data(3, []byte("x")))
	a.Send(data(3, []byte("y")))
	c.Want(data(3, []byte("y")))
}

func rowFullChannel(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Establish(a, 100, 1)
	a.StopReading()
	piece := func(i int) []byte {
		b := make([]byte, 32000)
		binary.BigEndian.PutUint32(b, uint32(i))
		return b
	}
	const most = 2000 // 64 MB, more than any budget
	sent := make(chan int, 1)
	stop := make(chan struct{})
	go func() {
		for i := range most {
			select {
			case <-stop:
				sent <- i
				return
			default:
			}
			if c.TrySend(marshal(data(1, piece(i)))) != nil {
				sent <- i
				return
			}
		}
		sent <- most
	}()
	s.WantMetric(1, "full_receive_channels", "service_method", "Proxy")
	t.Sleep(300 * time.Millisecond)
	s.WantMetric(1, "full_receive_channels", "service_method", "Proxy")
	close(stop)
	a.GoOnReading()
	n := <-sent
	t.Notef("full after at most %d packets of 32,000 bytes", n)
	for i := range n {
		a.Want(data(1, piece(i)))
	}
	s.WantMetric(0, "full_receive_channels", "service_method", "Proxy")

	// Closed meanwhile: no deadlock, neither for it nor for another client.
	a.StopReading()
	go func() {
		for i := range most {
			if c.TrySend(marshal(data(1, piece(i)))) != nil {
				return
			}
		}
	}()
	s.WantMetric(1, "full_receive_channels", "service_method", "Proxy")
	c.cancel()
	c.WantEnd(codes.Canceled, "")
	a.GoOnReading()
	for {
		if p := a.Next(); p.Type == pb.PacketType_CLOSE_REQ {
			if p.GetCloseRequest().GetConnectID() != 1 {
				t.Errorf("the agent was sent %s", show(p))
			}
			break
		}
	}
	s.WantMetric(0, "full_receive_channels", "service_method", "Proxy")
	s.Establish(a, 101, 2)
}

func rowCancelPending(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(dialReq(8, "127.0.0.1:80"))
	a.Want(dialReq(8, "127.0.0.1:80"))
	s.WantMetric(1, "pending_backend_dials")
	c.Send(dialCls(8))
	s.WantMetric(1, "dial_failure_count", "reason", "frontend_close")
	s.WantMetric(0, "pending_backend_dials")
	a.Drain(100 * time.Millisecond) // ours may tell the agent; Go does not
	a.Send(dialRsp(8, 5))
	a.Want(closeReq(5))
	s.WantMetric(1, "dial_failure_count", "reason", "unrecognized_response")
	c.Silence(200 * time.Millisecond)
	s.WantMetric(0, "established_connections")
}

// ways in which a client goes.
var vanish = []struct {
	name string
	do   func(*stream)
}{
	{"RST_STREAM", func(c *stream) { c.cancel() }},
	{"socket closed", func(c *stream) { c.hangUp() }},
	{"END_STREAM", func(c *stream) { c.HalfClose() }},
}

func rowVanishPending(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	for i, way := range vanish {
		random := int64(100 + i)
		c := s.Client(way.name)
		c.Send(dialReq(random, "127.0.0.1:80"))
		a.Want(dialReq(random, "127.0.0.1:80"))
		way.do(c)
		a.Want(dialCls(random))
		if t.poll(2*time.Second, func() error {
			if n := s.Metric("pending_backend_dials"); n != 0 {
				return fmt.Errorf("%v", n)
			}
			return nil
		}) != nil {
			t.ServerDiffers("%s: pending_backend_dials still counts the dial", way.name)
		}
		a.Send(dialRsp(random, int64(1+i)))
		a.Want(closeReq(int64(1 + i)))
	}
}

func rowVanishEstablished(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	for i, way := range vanish {
		c := s.Establish(a, int64(100+i), int64(1+i))
		way.do(c)
		a.Want(closeReq(int64(1 + i)))
		if way.name == "END_STREAM" {
			c.WantEnd(codes.OK, "")
		}
	}
	s.WantMetric(0, "grpc_connections", "service_method", "Proxy")
	if got := s.Metric("established_connections"); got != 0 {
		t.ServerDiffers("established_connections is %v after all clients have gone", got)
	}
}

func rowErrorAnswer(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(dialReq(8, "127.0.0.1:1"))
	a.Want(dialReq(8, "127.0.0.1:1"))
	rsp := marshal(dialErr(8, "dial tcp 127.0.0.1:1: connect: connection refused"))
	a.SendRaw(rsp)
	c.WantRaw(rsp)
	t.WantDialFailures(s, nil, map[string]float64{"error_response": 1}, nil)
	s.WantMetric(0, "established_connections")
	s.WantMetric(0, "pending_backend_dials")
	a.Silence(100 * time.Millisecond)
	c.Silence(100 * time.Millisecond)
}

func rowAgentCloses(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Establish(a, 100, 1)
	s.WantMetric(1, "established_connections")
	a.Send(closeRsp(1, ""), closeRsp(1, "again"))
	c.Want(closeRsp(1, ""))
	c.Silence(200 * time.Millisecond)
	s.WantMetric(0, "established_connections")
	s.WantMetric(1, "dial_duration_seconds_count")
	all, err := scrape(s.health("/metrics"))
	t.Check(err, "metrics")
	if n, ok := all[metricPrefix+"server_connection_duration_seconds_count"]; !ok || n != 1 {
		t.ServerDiffers("connection_duration_seconds counts %v (there: %v), want 1", n, ok)
	}
}

func rowAgentUnknownData(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	a.Send(data(99, []byte("x")))
	a.Want(closeReq(99))
	a.Send(closeRsp(99, "unrecognized connectID"))
	a.Silence(200 * time.Millisecond)
}

// twoStreams has one connection on each of two streams of one agent ID. The
// way there: the strategy destHost looks at streams, and the first one drains.
func (s *Server) twoStreams(id1, id2 int64) (a1, a2 *FakeAgent, c1, c2 *stream) {
	a1 = s.FakeAgent("same", "host=h")
	c1 = s.EstablishTo(a1, 100, id1, "h:80")
	a2 = s.FakeAgent("same", "host=h")
	a1.Send(drain())
	s.t.Sleep(200 * time.Millisecond)
	c2 = s.EstablishTo(a2, 200, id2, "h:80")
	return a1, a2, c1, c2
}

func rowAgentStreamEnds(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost"})
	a1, a2, c1, c2 := s.twoStreams(1, 2)
	c3 := s.EstablishTo(a2, 300, 3, "h:80")
	a1.cancel()
	c1.Want(closeRsp(1, ""))
	alive := func(c *stream, id int64) bool {
		c.Send(data(id, []byte("up")))
		a2.Want(data(id, []byte("up")))
		a2.Send(data(id, []byte("down")))
		r, ok := c.next(patience / 2)
		return ok && r.pkt.GetType() == pb.PacketType_DATA
	}
	if !alive(c2, 2) {
		t.ServerDiffers("a connection of the other stream of this agent ID is lost too")
		return
	}
	if !alive(c3, 3) {
		t.Errorf("a second connection of the other stream is lost")
	}
	s.EstablishTo(a2, 400, 4, "h:80")
	a2.hangUp()
	c2.Want(closeRsp(2, ""))
	c3.Want(closeRsp(3, ""))
	s.WantMetric(0, "ready_backends", "proxy_strategy", "destHost")
	s.WantMetric(0, "established_connections")
}

func rowAgentEndsPending(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(dialReq(8, "127.0.0.1:80"))
	a.Want(dialReq(8, "127.0.0.1:80"))
	a.hangUp()
	r, ok := c.next(2 * time.Second)
	if !ok {
		t.Fatalf("the client is not told (waited 2 s)")
	}
	if rsp := r.pkt.GetDialResponse(); r.pkt.GetType() == pb.PacketType_DIAL_RSP {
		if rsp.GetRandom() != 8 || rsp.GetError() == "" || rsp.GetConnectID() != 0 {
			t.Errorf("answered %s", show(r.pkt))
		}
	} else if r.pkt.GetType() != pb.PacketType_DIAL_CLS || r.pkt.GetCloseDial().GetRandom() != 8 {
		t.Errorf("answered %s", show(r.pkt))
	}
	t.Notef("answered %s", show(r.pkt))
	t.WantDialFailures(s, nil, map[string]float64{"backend_close": 1}, nil)
	s.WantMetric(0, "pending_backend_dials")
}

func rowBackendDialTimeout(t *T) {
	s := t.StartServer(ServerOpts{Args: []string{"--backend-dial-timeout=1s"}})
	a := s.FakeAgent("a")
	c := s.Client("client")
	begin := time.Now()
	c.Send(dialReq(8, "127.0.0.1:80"))
	a.Want(dialReq(8, "127.0.0.1:80"))
	c.Want(dialErr(8, "timed out waiting for backend dial"))
	if d := time.Since(begin); d < 900*time.Millisecond || d > 2500*time.Millisecond {
		t.Errorf("answered after %v, want 1 s", d)
	}
	t.WantDialFailures(s, nil, map[string]float64{"backend_dial_timeout": 1}, nil)
	s.WantMetric(0, "pending_backend_dials")
	s.WaitBackends(1)
	if !a.Open() {
		t.Fatalf("the agent's stream was ended")
	}
	a.Drain(100 * time.Millisecond)
	a.Send(dialRsp(8, 5)) // late
	a.Want(closeReq(5))
	s.Establish(a, 9, 6)
}

// flood sends DATA until the stream ends.
func flood(c *stream, connID int64) {
	piece := marshal(data(connID, make([]byte, 32000)))
	for c.TrySend(piece) == nil {
	}
}

func rowBackendBlocked(t *T) {
	s := t.StartServer(ServerOpts{Args: []string{"--backend-dial-timeout=1s"}})
	a := s.FakeAgent("a")
	c := s.Establish(a, 100, 1)
	a.StopReading()
	go flood(c, 1)
	t.Sleep(time.Second)
	c2 := s.Client("client 2")
	begin := time.Now()
	c2.Send(dialReq(8, "127.0.0.1:80"))
	c2.Want(dialErr(8, "timed out waiting for backend dial"))
	if d := time.Since(begin); d < 900*time.Millisecond || d > 2500*time.Millisecond {
		t.Errorf("answered after %v, want 1 s", d)
	}
	s.WaitBackends(0)
	s.WantMetric(0, "pending_backend_dials")
	s.WantMetric(1, "dial_failure_count", "reason", "backend_dial_timeout")
	a.GoOnReading()
	a.WantAnyEnd()
	c3 := s.Client("client 3")
	c3.Send(dialReq(9, "127.0.0.1:80"))
	c3.Want(dialErr(9, "No agent available"))
}

func rowSeveralDials(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Client("client")
	c.Send(dialReq(1, "127.0.0.1:81"), dialReq(2, "127.0.0.1:82"))
	a.Want(dialReq(1, "127.0.0.1:81"), dialReq(2, "127.0.0.1:82"))
	a.Send(dialRsp(2, 12), dialRsp(1, 11))
	c.Want(dialRsp(2, 12), dialRsp(1, 11))
	a.Send(data(11, []byte("a")), data(12, []byte("b")))
	// Between connections there is no order.
	c.WantSet(data(11, []byte("a")), data(12, []byte("b")))
	c.Send(data(11, []byte("first")))
	a.Want(data(11, []byte("first")))
	c.Send(data(12, []byte("second")))
	if p := a.Next(); p.Type != pb.PacketType_DATA {
		t.ServerDiffers("DATA on the second connection ends both: agent was sent %s", show(p))
		return
	}
	c.Send(closeReq(11), data(12, []byte("third")))
	a.Want(closeReq(11))
	a.Send(closeRsp(11, ""))
	c.Want(closeRsp(11, ""))
	a.Want(data(12, []byte("third")))
	c.HalfClose()
	a.Want(closeReq(12))
}

// wrongPayloads are packets whose payload does not fit their type.
func wrongPayloads() map[string][]byte {
	swapped := func(kind pb.PacketType, p *pb.Packet) []byte {
		return marshal(&pb.Packet{Type: kind, Payload: p.Payload})
	}
	return map[string][]byte{
		"empty message":                {},
		"DIAL_REQ with CLOSE_REQ":      swapped(pb.PacketType_DIAL_REQ, closeReq(1)),
		"DIAL_RSP without payload":     {0x08, 1},
		"CLOSE_REQ without payload":    {0x08, 2},
		"CLOSE_RSP without payload":    {0x08, 3},
		"DATA without payload":         {0x08, 4},
		"DIAL_CLS without payload":     {0x08, 5},
		"DRAIN without payload":        {0x08, 6},
		"DATA with CLOSE_RSP":          swapped(pb.PacketType_DATA, closeRsp(1, "x")),
		"CLOSE_REQ with DATA":          swapped(pb.PacketType_CLOSE_REQ, data(1, []byte("x"))),
		"DIAL_CLS with DIAL_REQ":       swapped(pb.PacketType_DIAL_CLS, dialReq(1, "x")),
		"DIAL_RSP with DATA":           swapped(pb.PacketType_DIAL_RSP, data(1, []byte("x"))),
		"CLOSE_RSP with an empty DATA": {0x08, 3, 0x22, 0},
	}
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	for i := range keys {
		for j := i; j > 0 && keys[j] < keys[j-1]; j-- {
			keys[j], keys[j-1] = keys[j-1], keys[j]
		}
	}
	return keys
}

func rowWrongPayload(t *T) {
	start := func() (*Server, *FakeAgent, *stream) {
		s := t.StartServer(ServerOpts{})
		a := s.FakeAgent("a")
		return s, a, s.Establish(a, 100, 1)
	}
	s, a, bystander := start()
	n, crashes := byte(0), 0
	fine := func() bool {
		if !s.Alive() || !a.Open() || !bystander.Open() {
			return false
		}
		n++
		bystander.Send(data(1, []byte{n}))
		a.Want(data(1, []byte{n}))
		a.Send(data(1, []byte{n}))
		bystander.Want(data(1, []byte{n}))
		return true
	}
	cases := wrongPayloads()
	for _, from := range []string{"client", "client with a connection", "agent"} {
		for _, name := range sortedKeys(cases) {
			var c *stream
			switch from {
			case "client":
				c = s.Client("offender")
				c.SendRaw(cases[name])
			case "client with a connection":
				c = s.Establish(a, 200, 2)
				c.SendRaw(cases[name])
			default:
				a.SendRaw(cases[name])
			}
			t.Sleep(50 * time.Millisecond)
			if c != nil {
				c.cancel()
				t.Sleep(20 * time.Millisecond)
				for _, p := range a.Drain(30 * time.Millisecond) {
					if p.GetType() != pb.PacketType_CLOSE_REQ || p.GetCloseRequest().GetConnectID() != 2 {
						t.Errorf("%s from a %s: the agent was sent %s", name, from, show(p))
					}
				}
			}
			if !fine() {
				t.Errorf("%s from a %s: the server, the agent's stream or another client's stream ended", name, from)
				s.Kill()
				if crashes++; crashes > 3 {
					return // each crash costs a start
				}
				s, a, bystander = start()
			}
		}
	}
}

func rowUndecodable(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	bystander := s.Establish(a, 100, 1)
	for _, raw := range [][]byte{
		{0xff, 0xff, 0xff},
		{0x08},
		{0x08, 4, 0x22, 200, 1},
		{0x08, 4, 0x22, 3, 0x08, 0x80, 0x80},
		append([]byte{0x12, 5, 0x0a, 3}, 'a', 0xff, 'b'), // invalid UTF-8 in DialRequest.protocol
		{0x08, 4, 0x0c}, // end of a group that has not begun
	} {
		c := s.Client("client")
		c.SendRaw(raw)
		c.WantEnd(codes.Internal, "grpc: failed to unmarshal the received message")
	}
	bystander.Send(data(1, []byte("x")))
	a.Want(data(1, []byte("x")))
}

func rowUnknownMethods(t *T) {
	s := t.StartServer(ServerOpts{})
	for path, message := range map[string]string{
		"/ProxyService/Nope":           "unknown method Nope for service ProxyService",
		"/x.y/Z":                       "unknown service x.y",
		"/AgentService/Connect":        "unknown service AgentService",
		"/ProxyService/Proxy/x":        "unknown service ProxyService/Proxy",
		"/ProxyService/":               "unknown method  for service ProxyService",
		"/grpc.health.v1.Health/Check": "unknown service grpc.health.v1.Health",
	} {
		target, opts := s.frontDial()
		c, _, _, err := t.openStream(path, path, target, opts, nil)
		t.Check(err, "open stream")
		go c.readLoop()
		c.WantEnd(codes.Unimplemented, message)
	}
	h := s.RawH2()
	id := h.Request("/ProxyService/Proxy", "text/plain", false)
	r := h.WantResponse(id)
	if r.header[":status"] != "415" || r.header["grpc-status"] != "3" || r.header["grpc-message"] != `invalid gRPC request content-type "text/plain"` {
		t.Errorf("content-type text/plain: answered %v", r.header)
	}
}

func rowTooLarge(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	bystander := s.Establish(a, 100, 1)
	c := s.Establish(a, 200, 2)
	exact := make([]byte, 4<<20-len(marshal(data(2, make([]byte, 4<<20))))+4<<20)
	c.Send(data(2, exact))
	a.Want(data(2, exact))
	go c.TrySend(marshal(data(2, make([]byte, 5<<20))))
	c.WantEnd(codes.ResourceExhausted, "grpc: received message larger than max")
	a.Want(closeReq(2))
	bystander.Send(data(1, []byte("x")))
	a.Want(data(1, []byte("x")))
}

func rowForeignConnectID(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	victim := s.Establish(a, 100, 1)
	attack := func(name string, established bool, pkts ...*pb.Packet) {
		c := s.Client(name)
		if established {
			c.Send(dialReq(200, "127.0.0.1:80"))
			a.Accept(2)
			c.Want(dialRsp(200, 2))
		} else {
			c.Send(dialReq(200, "127.0.0.1:80"))
			a.WantDial()
		}
		for _, p := range pkts {
			c.TrySend(marshal(p))
		}
		t.Sleep(200 * time.Millisecond)
		c.cancel()
		for _, p := range a.Drain(200 * time.Millisecond) {
			if p.GetType() == pb.PacketType_DATA && p.GetData().GetConnectID() == 1 || p.GetType() == pb.PacketType_CLOSE_REQ && p.GetCloseRequest().GetConnectID() == 1 {
				t.Errorf("%s: the agent was sent %s for another client's connection", name, show(p))
			}
		}
	}
	attack("foreign DATA", true, data(1, []byte("evil")))
	attack("foreign DATA after own", true, data(2, []byte("mine")), data(1, []byte("evil")))
	attack("foreign CLOSE_REQ", true, closeReq(1))
	attack("foreign DATA, dial pending", false, data(1, []byte("evil")))
	attack("foreign CLOSE_REQ, dial pending", false, closeReq(1))
	victim.Send(data(1, []byte("still mine")))
	a.Want(data(1, []byte("still mine")))
	a.Send(data(1, []byte("yours")))
	victim.Want(data(1, []byte("yours")))
}

func rowPercentAuthority(t *T) {
	s := t.StartServer(ServerOpts{UDS: true})
	a := s.FakeAgent("a")
	h := s.RawH2()
	h.Authority = strings.ReplaceAll(s.UDS, "/", "%2F")
	id := h.Request("/ProxyService/Proxy", "application/grpc", false)
	h.Message(id, marshal(dialReq(8, "127.0.0.1:80")), false)
	a.Accept(1)
	h.WantMessage(id, marshal(dialRsp(8, 1)))

	tunnel := s.MustTunnel()
	go func() {
		p, ok := a.next(patience)
		if ok && p.pkt.GetType() == pb.PacketType_DIAL_REQ {
			a.TrySend(marshal(dialRsp(p.pkt.GetDialRequest().GetRandom(), 2)))
		}
	}()
	_, err := tunnel.DialContext(t.Ctx, "tcp", "127.0.0.1:80")
	t.Check(err, "stock client over UDS")
}

func rowPingAndWindows(t *T) {
	s := t.StartServer(ServerOpts{UDS: true})
	a := s.FakeAgent("a")
	h := s.RawH2()
	for i := range 3 {
		payload := [8]byte{0xde, 0xad, byte(i)}
		begin := time.Now()
		h.Ping(payload)
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("PING answered after %v", d)
		}
	}
	h.AutoCredit(false)
	id := h.Request("/ProxyService/Proxy", "application/grpc", false)
	h.Message(id, marshal(dialReq(8, "127.0.0.1:80")), false)
	a.Accept(1)
	h.WantMessage(id, marshal(dialRsp(8, 1)))
	h.Settings(h2InitialWindow, 1000)
	used := h.DataBytes(id)
	payload := bytes.Repeat([]byte("0123456789"), 1000)
	a.Send(data(1, payload))
	t.Sleep(400 * time.Millisecond)
	if got := h.DataBytes(id); got > 1000 || got <= used {
		t.Errorf("with a window of 1,000 the stream has got %d bytes in all, %d before", got, used)
	}
	h.Settings(h2InitialWindow, 2000)
	t.Sleep(400 * time.Millisecond)
	if got := h.DataBytes(id); got > 2000 || got <= 1000 {
		t.Errorf("with a window of 2,000 the stream has got %d bytes in all", got)
	}
	h.Settings(h2InitialWindow, 500) // a negative window
	h.Ping([8]byte{1})
	h.WindowUpdate(id, 1000) // still negative
	t.Sleep(300 * time.Millisecond)
	if got := h.DataBytes(id); got > 2000 {
		t.Errorf("with a negative window the stream has got %d bytes in all", got)
	}
	h.Settings(h2InitialWindow, 65535)
	h.WantMessage(id, marshal(data(1, payload)))
	h.Message(id, marshal(data(1, []byte("up"))), false)
	a.Want(data(1, []byte("up")))
}

// konnbench runs the load client and returns its report.
func (t *T) konnbench(s *Server, target string, args ...string) map[string]any {
	argv := append([]string{"--target", target}, args...)
	if s.UDS != "" {
		argv = append(argv, "--uds", s.UDS)
	} else {
		c := t.env.Certs
		argv = append(argv, "--server-addr", fmt.Sprintf("127.0.0.1:%d", s.Front), "--ca", c.FrontendCA.File, "--cert", c.Client.CertFile, "--key", c.Client.KeyFile)
	}
	out, err := exec.CommandContext(t.Ctx, t.env.Konnbench, argv...).Output()
	t.Check(err, "konnbench")
	var report map[string]any
	t.Check(json.Unmarshal(out, &report), "konnbench's report")
	return report
}

func (t *T) greeter() *Target {
	payload := make([]byte, 64<<10)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	return t.Target(func(c *net.TCPConn) {
		c.Write(payload)
		// Held open until the other end goes.
		c.Read(make([]byte, 1))
	})
}

func rowGreetGRPC(t *T) {
	target := t.greeter()
	for _, uds := range []bool{false, true} {
		s, a := t.StartPair(ServerOpts{UDS: uds}, AgentOpts{})
		// In order and after the DIAL_RSP, as seen by a client that loses nothing.
		c := s.Client("client")
		c.Send(dialReq(8, target.Addr))
		p := c.Next()
		if p.Type != pb.PacketType_DIAL_RSP || p.GetDialResponse().GetError() != "" {
			t.Fatalf("first packet is %s", show(p))
		}
		got := c.Collect(p.GetDialResponse().GetConnectID(), 64<<10)
		for i, b := range got {
			if b != byte(i*7) {
				t.Fatalf("wrong byte at %d", i)
			}
		}
		via := "mTLS"
		if uds {
			via = "UDS"
		}
		r := t.konnbench(s, target.Addr, "--transport", "grpc", "--mode", "greet", "--count", "300", "--size", "65536", "--timeout", "3s")
		t.Notef("stock client over %s: %v of 300 greetings heard", via, r["heard"])
		if heard, _ := r["heard"].(float64); heard < 299 {
			t.ServerDiffers("stock client over %s: %v of 300 greetings heard, errors %v", via, heard, r["errors"])
		}
		s.Kill()
		a.Kill()
	}
}

func rowCollidingIDs(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost"})
	a1, a2, c1, c2 := s.twoStreams(1, 1)
	a1.Send(data(1, []byte("from one")))
	a2.Send(data(1, []byte("from two")))
	c1.Want(data(1, []byte("from one")))
	c2.Want(data(1, []byte("from two")))
	c1.Send(data(1, []byte("to one")))
	c2.Send(data(1, []byte("to two")))
	a1.Want(data(1, []byte("to one")))
	a2.Want(data(1, []byte("to two")))
	s.WantMetric(2, "established_connections")
	a1.Send(closeRsp(1, ""))
	c1.Want(closeRsp(1, ""))
	a2.Send(data(1, []byte("still here")))
	c2.Want(data(1, []byte("still here")))
	c2.HalfClose()
	a2.Want(closeReq(1))
	a1.Silence(200 * time.Millisecond)
}
