package suite

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	a := func(id string, need Need, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: need, Side: AgentSide, Scripted: true, Run: run})
	}
	a("A01", Must, "headers, ALPN, path, token read anew", rowAgentHeaders)
	a("A02", Must, "dial succeeds", rowAgentDial)
	a("A03", Must, "data both ways", rowAgentData)
	a("A04", Must, "target closes: CLOSE_RSP after all its data", rowAgentTargetCloses)
	a("A05", Must, "CLOSE_REQ: CLOSE_RSP, the target sees EOF", rowAgentClose)
	a("A06", Must, "CLOSE_REQ again or unknown", rowAgentCloseUnknown)
	a("A07", Must, "DATA for an unknown connection", rowAgentDataUnknown)
	a("A08", Must, "DATA 0, DIAL_CLS, unknown type: silence", rowAgentSilence)
	a("A09", Must, "failing dials in Go's words, counted", rowAgentDialFails)
	a("A10", Must, "server drops while dialling: nothing leaks", rowAgentServerDrops)
	a("A11", Must, "SIGTERM: DRAIN at once, service goes on, second one ends", rowAgentDrain)
	a("A12", Should, "64 KiB greeting arrives in messages below 4 MiB", rowAgentGreeting)
	a("A14", Differ, "DATA queued before CLOSE_REQ is written", rowAgentCloseQueued)
	a("A15", Must, "several servers: distinct IDs, duplicates closed", rowAgentSeveralServers)
	a("A16", Should, "--sync-forever keeps trying beyond the count", rowAgentSyncForever)
	a("A17", Should, "backoff without a server", rowAgentBackoff)
	a("A18", Should, "server without serverid or servercount is given up", rowAgentHeaderMissing)
	a("A20", Differ, "message without payload", rowAgentWrongPayload)
	a("A21", Should, "/readyz?verbose", rowAgentReadyz)
	a("A22", Should, "admin /metrics redirects to the health port", rowAgentAdmin)
}

func (t *T) agentOf(f *FakeServer, o AgentOpts) (*Agent, *AgentStream) {
	a := t.StartAgent(f.Port, o)
	s := f.Agent()
	a.WaitReady()
	return a, s
}

func (t *T) theAgent() (*Agent, *AgentStream) { return t.agentOf(t.FakeServer("s"), AgentOpts{}) }

func rowAgentHeaders(t *T) {
	f := t.FakeServer("s")
	a, s := t.agentOf(f, AgentOpts{ID: "my-agent"})
	check := func(s *AgentStream, key string, want ...string) {
		if got := s.MD.Get(key); !slices.Equal(got, want) {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	check(s, "agentid", "my-agent")
	check(s, "agentidentifiers", "")
	check(s, "authorization")
	check(s, "content-type", "application/grpc")
	if s.Method != "/AgentService/Connect" || s.ALPN != "h2" {
		t.Errorf("path %q, ALPN %q", s.Method, s.ALPN)
	}
	a.Kill()

	token := filepath.Join(t.dir, "token")
	t.Check(os.WriteFile(token, []byte("first"), 0o600), "token")
	a, s = t.agentOf(f, AgentOpts{Identifiers: "host=h&ipv4=1.2.3.4", Args: []string{"--service-account-token-path=" + token}})
	check(s, "agentidentifiers", "host=h&ipv4=1.2.3.4")
	check(s, "authorization", "Bearer first")
	if id := s.MD.Get("agentid"); len(id) != 1 || !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`).MatchString(id[0]) {
		t.Errorf("the default agent ID is %q, want a UUID", id)
	}
	t.Check(os.WriteFile(token, []byte("second"), 0o600), "token")
	s.Finish(nil)
	s2 := f.Agent()
	check(s2, "authorization", "Bearer second")
	check(s2, "agentid", s.MD.Get("agentid")...)
	a.Kill()

	_, s = t.agentOf(f, AgentOpts{Env: []string{"PROXY_AGENT_ID=from-env"}})
	check(s, "agentid", "from-env")
}

func rowAgentDial(t *T) {
	a, s := t.theAgent()
	g := t.Target(nil)
	for i := range 3 {
		random := int64(111 + i)
		s.Send(dialReq(random, g.Addr))
		s.Want(dialRsp(random, int64(i+1)))
		t.Accept(g)
	}
	a.WantMetric(3, "open_endpoint_connections")
	a.WantMetric(3, "dial_duration_seconds_count")
	// A failing dial uses up a number too.
	s.Send(dialReq(200, t.closedPort()))
	if p := s.Next(); p.GetDialResponse().GetError() == "" || p.GetDialResponse().GetConnectID() != 0 {
		t.Errorf("dial of a closed port: answered %s", show(p))
	}
	s.Send(dialReq(1<<62+5, g.Addr))
	s.Want(dialRsp(1<<62+5, 5))

	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	t.Check(err, "listen")
	defer udp.Close()
	s.Send(dialReqProto(300, "udp", udp.LocalAddr().String()))
	s.Want(dialRsp(300, 6))
	s.Send(data(6, []byte("datagram")))
	buf := make([]byte, 100)
	udp.SetDeadline(time.Now().Add(patience))
	n, from, err := udp.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "datagram" {
		t.Fatalf("datagram: %q (%v)", buf[:n], err)
	}
	udp.WriteTo([]byte("one"), from)
	s.Want(data(6, []byte("one")))
	udp.WriteTo([]byte("two"), from)
	s.Want(data(6, []byte("two")))
	s.Send(dialReqProto(301, "foo", g.Addr))
	s.Want(dialErr(301, "dial foo: unknown network foo"))
}

func rowAgentData(t *T) {
	_, s := t.theAgent()
	g := t.Target(nil)
	id := s.Dial(111, g.Addr)
	c := t.Accept(g)
	for _, size := range []int{1, 0, 100, 4096, 32740, 1 << 20, 4<<20 - 100} {
		piece := bytes.Repeat([]byte{byte(size), byte(size >> 8), 7}, size/3+1)[:size]
		s.Send(data(id, piece))
		buf := make([]byte, size)
		_, err := io.ReadFull(c, buf)
		t.Check(err, "read at the target")
		if !bytes.Equal(buf, piece) {
			t.Fatalf("%d bytes changed on the way to the target", size)
		}
		go c.Write(piece)
		if got := s.Collect(id, size); !bytes.Equal(got, piece) {
			t.Fatalf("%d bytes changed on the way from the target", size)
		}
	}
}

func rowAgentTargetCloses(t *T) {
	a, s := t.theAgent()
	for _, size := range []int{0, 1, 1 << 20} {
		payload := bytes.Repeat([]byte("abc"), size)[:size]
		g := t.Target(func(c *net.TCPConn) { c.Write(payload) })
		id := s.Dial(111, g.Addr)
		if got := s.Collect(id, size); !bytes.Equal(got, payload) {
			t.Errorf("%d bytes changed", size)
		}
		s.Want(closeRsp(id, ""))
		s.Silence(100 * time.Millisecond)
	}
	a.WantMetric(0, "open_endpoint_connections")
	// Only the target's half is closed: the original takes that for the end.
	g := t.Target(nil)
	id := s.Dial(112, g.Addr)
	c := t.Accept(g)
	c.Write([]byte("bye"))
	c.CloseWrite()
	s.Want(data(id, []byte("bye")), closeRsp(id, ""))
	s.Send(data(id, []byte("too late")))
	s.Want(closeRsp(id, "unrecognized connectID"))
	// Reset.
	id = s.Dial(113, g.Addr)
	reset(t.Accept(g))
	s.Want(closeRsp(id, ""))
	a.WantMetric(0, "open_endpoint_connections")
}

func rowAgentClose(t *T) {
	a, s := t.theAgent()
	g := t.Target(nil)
	id := s.Dial(111, g.Addr)
	c := t.Accept(g)
	s.Send(data(id, []byte("x")))
	t.wantBytes(c, "x")
	s.Send(closeReq(id))
	s.Want(closeRsp(id, ""))
	t.wantEOF(c)
	a.WantMetric(0, "open_endpoint_connections")
	// In the middle of the target's data.
	id = s.Dial(112, g.Addr)
	c = t.Accept(g)
	go c.Write(make([]byte, 8<<20))
	s.Collect(id, 10000)
	s.Send(closeReq(id))
	for {
		p := s.Next()
		if p.Type == pb.PacketType_CLOSE_RSP {
			if p.GetCloseResponse().GetError() != "" || p.GetCloseResponse().GetConnectID() != id {
				t.Errorf("received %s", show(p))
			}
			break
		}
	}
	if late := s.Drain(300 * time.Millisecond); len(late) > 0 {
		t.AgentDiffers("%s after the CLOSE_RSP", show(late[0]))
	}
}

func rowAgentCloseUnknown(t *T) {
	_, s := t.theAgent()
	s.Send(closeReq(98))
	s.Want(closeRsp(98, "Unknown connectID"))
	g := t.Target(nil)
	id := s.Dial(111, g.Addr)
	s.Send(closeReq(id))
	s.Want(closeRsp(id, ""))
	s.Send(closeReq(id))
	s.Want(closeRsp(id, "Unknown connectID"))
}

func rowAgentDataUnknown(t *T) {
	_, s := t.theAgent()
	s.Send(data(99, []byte("x")))
	s.Want(closeRsp(99, "unrecognized connectID"))
	g := t.Target(nil)
	id := s.Dial(111, g.Addr)
	s.Send(closeReq(id))
	s.Want(closeRsp(id, ""))
	s.Send(data(id, []byte("x")))
	s.Want(closeRsp(id, "unrecognized connectID"))
}

func rowAgentSilence(t *T) {
	_, s := t.theAgent()
	g := t.Target(nil)
	id := s.Dial(111, g.Addr)
	c := t.Accept(g)
	for _, raw := range [][]byte{
		marshal(data(0, []byte("nobody's"))), marshal(dialCls(111)), marshal(dialCls(77)), {0x08, 9}, {0x08, 9, 0x9a, 6, 1, 0x41},
		marshal(drain()), marshal(closeRsp(id, "x")), marshal(dialRsp(5, 5)), {0x08, 0x80, 0x80, 0x80, 0x08},
	} {
		s.SendRaw(raw)
	}
	s.Silence(300 * time.Millisecond)
	s.Send(data(id, []byte("x")))
	t.wantBytes(c, "x")
}

// lookupFails tells whether names that do not exist are known not to exist
// here; without a working resolver they time out.
func lookupFails(name string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err := net.DefaultResolver.LookupHost(ctx, name)
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}

func rowAgentDialFails(t *T) {
	a, s := t.theAgent()
	counts := map[string]float64{}
	fails := func(random int64, address, pattern, reason string, atLeast, atMost time.Duration) {
		begin := time.Now()
		s.Send(dialReq(random, address))
		r, ok := s.next(atMost)
		if !ok {
			t.Fatalf("dial of %q is not answered within %v", address, atMost)
		}
		rsp := r.pkt.GetDialResponse()
		if rsp.GetRandom() != random || rsp.GetConnectID() != 0 || !regexp.MustCompile("^"+pattern+"$").MatchString(rsp.GetError()) {
			t.Errorf("dial of %q: answered %s, want error %s", address, show(r.pkt), pattern)
		}
		if bytes.Contains(r.raw, []byte{0x10, 0}) && rsp.GetConnectID() == 0 && bytes.HasPrefix(r.raw[2:], []byte{0x10, 0}) {
			t.Errorf("connectID 0 is on the wire: % x", r.raw)
		}
		if d := time.Since(begin); d < atLeast {
			t.Errorf("dial of %q: answered after %v", address, d)
		}
		counts[reason]++
	}
	closed := t.closedPort()
	fails(1, closed, "dial tcp "+regexp.QuoteMeta(closed)+": connect: connection refused", "unknown", 0, 2*time.Second)
	fails(2, "127.0.0.1", "dial tcp: address 127.0.0.1: missing port in address", "unknown", 0, 2*time.Second)
	fails(3, "", "dial tcp: missing address", "unknown", 0, 2*time.Second)
	fails(4, "127.0.0.1:99999", "dial tcp: address 99999: invalid port", "unknown", 0, 2*time.Second)
	fails(5, "[::1", `dial tcp: address \[::1: missing '\]' in address`, "unknown", 0, 2*time.Second)
	fails(6, "::1:80", "dial tcp: address ::1:80: too many colons in address", "unknown", 0, 2*time.Second)
	hole := t.blackHole()
	fails(7, hole, "dial tcp "+regexp.QuoteMeta(hole)+": i/o timeout", "timeout", 4500*time.Millisecond, 6500*time.Millisecond)
	if name := "no-such-host.invalid"; lookupFails(name) {
		fails(8, name+":80", `dial tcp: lookup no-such-host\.invalid( on [^ ]+)?: no such host`, "unknown", 0, 5500*time.Millisecond)
	} else {
		t.Notef("no resolver here that denies a name: not tried")
	}
	t.WantDialFailures(nil, a, nil, counts)
	a.WantMetric(0, "open_endpoint_connections")
}

func rowAgentServerDrops(t *T) {
	f := t.FakeServer("s")
	a, s := t.agentOf(f, AgentOpts{})
	g := t.Target(nil)
	for i := range 5 {
		s.Send(dialReq(int64(i+1), g.Addr))
		s.Finish(nil)
		s = f.Agent()
	}
	// Whatever was dialled must be given up.
	t.Eventually(patience, func() error {
		for {
			select {
			case c := <-g.Conns:
				c.SetReadDeadline(time.Now().Add(patience))
				if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("a socket is left open (%v)", err)
				}
				continue
			default:
			}
			return nil
		}
	})
	a.WantMetric(0, "open_endpoint_connections")
	// Established ones end with the stream too.
	a.WaitReady()
	s.Dial(100, g.Addr)
	c := t.Accept(g)
	s.Finish(nil)
	t.wantEOF(c)
	a.WantMetric(0, "open_endpoint_connections")
	f.Agent()
}

func rowAgentDrain(t *T) {
	f := t.FakeServerHeaders(freePort(), func(n int) metadata.MD {
		return metadata.Pairs("serverid", fmt.Sprint("s", n), "servercount", "2")
	})
	a := t.StartAgent(f.Port, AgentOpts{})
	s1, s2 := f.Agent(), f.Agent()
	a.WantMetric(2, "open_server_connections")
	g := t.Echo()
	id := s1.Dial(1, g.Addr)
	a.Terminate()
	for i, s := range []*AgentStream{s1, s2} {
		if r, ok := s.next(2 * time.Second); !ok {
			t.AgentDiffers("no DRAIN on stream %d while it is idle", i+1)
			s.Send(dialCls(1)) // wakes Go's loop up
			s.Send(dialCls(1))
			s.Want(drain())
		} else if r.pkt.GetType() != pb.PacketType_DRAIN {
			t.Errorf("stream %d: received %s, want DRAIN", i+1, show(r.pkt))
		}
	}
	s1.Send(data(id, []byte("goes on")))
	s1.Want(data(id, []byte("goes on")))
	for i, s := range []*AgentStream{s1, s2} {
		id := s.Dial(int64(10+i), g.Addr)
		s.Send(data(id, []byte("new")))
		s.Want(data(id, []byte("new")))
		s.Silence(200 * time.Millisecond) // one DRAIN only
	}
	n := f.Count()
	s2.Finish(nil)
	t.Sleep(1500 * time.Millisecond)
	if got := f.Count(); got != n {
		t.Errorf("while draining the agent has opened %d new streams", got-n)
	}
	if !a.Alive() {
		t.Fatalf("the agent has ended while a connection was open")
	}
	a.Expect()
	a.Terminate()
	if !waitClosed(a.Done, 5*time.Second) {
		t.Fatalf("the agent does not end at the second signal")
	}
	if a.ExitCode() != 0 {
		t.Errorf("exit status %d", a.ExitCode())
	}
	s1.WantAnyEnd()

	// Ours ends by itself when nothing has happened for 10 s.
	a, s := t.agentOf(t.FakeServer("idle"), AgentOpts{})
	a.Expect()
	begin := time.Now()
	a.Terminate()
	id = 0
	if r, ok := s.next(2 * time.Second); ok && r.pkt.GetType() == pb.PacketType_DRAIN {
		id = s.Dial(1, g.Addr)
		t.Sleep(time.Second)
		s.Send(closeReq(id))
		s.Want(closeRsp(id, ""))
		begin = time.Now()
	}
	switch {
	case !waitClosed(a.Done, 15*time.Second):
		t.AgentDiffers("does not end by itself when drained")
	case a.ExitCode() != 0:
		t.Errorf("exit status %d when drained", a.ExitCode())
	case time.Since(begin) < 9*time.Second:
		t.Errorf("ended %v after the last connection, want 10 s", time.Since(begin))
	}
}

func rowAgentGreeting(t *T) {
	_, s := t.theAgent()
	payload := make([]byte, 64<<10)
	for i := range payload {
		payload[i] = byte(i >> 3)
	}
	g := t.Target(func(c *net.TCPConn) {
		c.Write(payload)
		c.Read(make([]byte, 1))
	})
	s.Send(dialReq(1, g.Addr))
	s.Want(dialRsp(1, 1))
	var got []byte
	largest, n := 0, 0
	for len(got) < len(payload) {
		r, ok := s.next(patience)
		if !ok || r.pkt.GetType() != pb.PacketType_DATA {
			t.Fatalf("%d of %d bytes, then %v", len(got), len(payload), r.pkt)
		}
		n++
		largest = max(largest, len(r.raw))
		got = append(got, r.pkt.GetData().GetData()...)
	}
	t.Notef("%d messages, the largest of %d bytes", n, largest)
	if !bytes.Equal(got, payload) || largest > 4<<20 {
		t.Errorf("data changed, or a message of %d bytes", largest)
	}
}

func rowAgentCloseQueued(t *T) {
	_, s := t.theAgent()
	lost := 0
	const runs, size = 5, 4 << 20
	for i := range runs {
		total := make(chan int, 1)
		g := t.Target(func(c *net.TCPConn) {
			c.SetReadBuffer(64 << 10)
			time.Sleep(500 * time.Millisecond)
			n, _ := io.Copy(io.Discard, c)
			total <- int(n)
		})
		id := s.Dial(int64(i+1), g.Addr)
		for range size / 32768 {
			s.Send(data(id, make([]byte, 32768)))
		}
		s.Send(closeReq(id))
		s.Want(closeRsp(id, ""))
		select {
		case n := <-total:
			if n != size {
				lost++
				t.Notef("run %d: the target got %d of %d bytes", i+1, n, size)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("the target sees no EOF")
		}
	}
	if lost > 0 {
		t.Errorf("in %d of %d runs data was lost that came before CLOSE_REQ", lost, runs)
	}
}

func rowAgentSeveralServers(t *T) {
	ids := []string{"a", "a", "b", "a", "b", "c", "a"}
	f := t.FakeServerHeaders(freePort(), func(n int) metadata.MD {
		return metadata.Pairs("serverid", ids[min(n, len(ids)-1)], "servercount", "3")
	})
	a := t.StartAgent(f.Port, AgentOpts{})
	first := map[string]*AgentStream{}
	for range 6 {
		s := f.Agent()
		if first[s.ServerID] == nil {
			first[s.ServerID] = s
			continue
		}
		s.WantAnyEnd() // a duplicate
	}
	a.WantMetric(3, "open_server_connections")
	a.WantMetric(3, "known_server_count")
	t.Sleep(500 * time.Millisecond)
	if n := f.Count(); n != 6 {
		t.Errorf("%d streams were opened, want 6", n)
	}
	g := t.Echo()
	for id, s := range first {
		if !s.Open() {
			t.Fatalf("the first stream to %s was closed", id)
		}
		cid := s.Dial(1, g.Addr)
		if cid != 1 {
			t.Errorf("connectIDs are not counted by stream: %d", cid)
		}
		s.Send(data(cid, []byte(id)))
		s.Want(data(cid, []byte(id)))
	}
	// One goes: it is replaced.
	first["b"].Finish(nil)
	a.WantMetric(2, "open_server_connections")
}

func rowAgentSyncForever(t *T) {
	f := t.FakeServer("only")
	a := t.StartAgent(f.Port, AgentOpts{Args: []string{"--sync-forever"}})
	first := f.Agent()
	for range 4 {
		f.Agent().WantAnyEnd()
	}
	if !first.Open() {
		t.Errorf("the first stream was closed")
	}
	a.WantMetric(1, "open_server_connections")
	a.Kill()

	f = t.FakeServer("only")
	t.agentOf(f, AgentOpts{})
	t.Sleep(1500 * time.Millisecond)
	if n := f.Count(); n != 1 {
		t.Errorf("without --sync-forever %d streams were opened", n)
	}
}

func rowAgentBackoff(t *T) {
	port := freePort()
	ln, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	t.Check(err, "listen")
	defer ln.Close()
	var mu sync.Mutex
	var times []time.Time
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			times = append(times, time.Now())
			mu.Unlock()
			c.Close()
		}
	}()
	a := t.StartAgent(port, AgentOpts{Slow: true, Args: []string{"--sync-interval=200ms", "--sync-interval-cap=1s"}})
	t.Sleep(8 * time.Second)
	a.Kill()
	mu.Lock()
	defer mu.Unlock()
	var gaps []time.Duration
	for i := 1; i < len(times); i++ {
		gaps = append(gaps, times[i].Sub(times[i-1]).Round(time.Millisecond))
	}
	t.Notef("gaps %v", gaps)
	// 0.2 0.3 0.45 0.68 1 1 1 …: 8 s make about 10 attempts.
	if len(times) < 7 || len(times) > 14 {
		t.Errorf("%d attempts in 8 s, want about 10", len(times))
	}
	for i, gap := range gaps {
		if gap < 150*time.Millisecond || gap > 1600*time.Millisecond {
			t.Errorf("gap %d is %v", i, gap)
		}
	}
	if n := len(gaps); n > 5 && (gaps[0] > 500*time.Millisecond || gaps[n-1] < 700*time.Millisecond) {
		t.Errorf("the gaps do not grow from 200 ms to 1 s")
	}
}

func rowAgentHeaderMissing(t *T) {
	for name, md := range map[string]metadata.MD{
		"no serverid":           metadata.Pairs("servercount", "1"),
		"no servercount":        metadata.Pairs("serverid", "s"),
		"two serverids":         metadata.Pairs("serverid", "s", "serverid", "t", "servercount", "1"),
		"servercount no number": metadata.Pairs("serverid", "s", "servercount", "many"),
	} {
		f := t.FakeServerHeaders(freePort(), func(n int) metadata.MD {
			if n >= 2 {
				return metadata.Pairs("serverid", "good", "servercount", "1")
			}
			return md
		})
		a := t.StartAgent(f.Port, AgentOpts{})
		s := f.Agent()
		s.WantAnyEnd()
		if code, _, _ := httpGet(a.health("/readyz")); code != 503 {
			t.Errorf("%s: /readyz answers %d", name, code)
		}
		f.Agent().WantAnyEnd() // retried
		a.WaitReady()
		a.Kill()
	}
}

func rowAgentWrongPayload(t *T) {
	f := t.FakeServer("s")
	a, s := t.agentOf(f, AgentOpts{})
	g := t.Target(nil)
	var id, random int64
	var c *net.TCPConn
	open := func() {
		random++
		id = s.Dial(random, g.Addr)
		c = t.Accept(g)
	}
	open()
	cases := wrongPayloads()
	for _, name := range sortedKeys(cases) {
		s.SendRaw(cases[name])
		// Whatever is answered, the connection and the stream go on.
		s.Drain(100 * time.Millisecond)
		ok := func() bool {
			if s.TrySend(marshal(data(id, []byte("x")))) != nil {
				return false
			}
			c.SetReadDeadline(time.Now().Add(time.Second))
			buf := make([]byte, 1)
			_, err := c.Read(buf)
			return err == nil && buf[0] == 'x' && s.Open() && a.Alive()
		}()
		if !ok {
			t.Errorf("%s: the stream or the agent has ended", name)
			if !waitClosed(a.Done, 500*time.Millisecond) {
				s.Finish(nil)
				s = f.Agent()
			} else {
				a.Expect()
				a, s = t.agentOf(f, AgentOpts{})
			}
			open()
		}
	}
	open()
}

func rowAgentReadyz(t *T) {
	f := t.FakeServer("s")
	a, _ := t.agentOf(f, AgentOpts{})
	check := func(path string, wantCode int, want string) {
		code, body, err := httpGet(a.health(path))
		if err != nil || code != wantCode || body != want {
			t.Errorf("%s answers %d %q (%v), want %d %q", path, code, body, err, wantCode, want)
		}
	}
	check("/readyz", 200, "ok")
	check("/ready", 200, "ok")
	check("/healthz", 200, "ok")
	check("/readyz?verbose", 200, "[+]ping ok\n[+]server-connected ok\ncheck passed\n")
	f.srv.Stop()
	t.WaitStatus(a.health("/readyz"), 503)
	check("/readyz", 503, "[+]ping ok\n[-]server-connected failed: no servers connected\n")
	check("/readyz?verbose", 503, "[+]ping ok\n[-]server-connected failed: no servers connected\n")
	check("/healthz", 200, "ok")
}

func rowAgentAdmin(t *T) {
	a, s := t.theAgent()
	s.Dial(1, t.Echo().Addr)
	admin := fmt.Sprintf("http://127.0.0.1:%d", a.AdminPort)
	code, header, _, err := httpGetHeader(admin + "/metrics")
	t.Check(err, "admin /metrics")
	if want := fmt.Sprintf("//127.0.0.1:%d/metrics", a.HealthPort); code != 301 || strings.TrimPrefix(header.Get("Location"), "http:") != want {
		t.Errorf("admin /metrics answers %d, Location %q, want 301 to %q", code, header.Get("Location"), want)
	}
	if code, _, _ := httpGet(admin + "/debug/pprof/"); code != 404 {
		t.Errorf("/debug/pprof/ answers %d without --enable-profiling", code)
	}
	code, body, err := httpGet(a.health("/metrics"))
	if err != nil || code != 200 || !strings.Contains(body, "# HELP "+metricPrefix+"agent_open_endpoint_connections Current number of open endpoint connections.\n") {
		t.Errorf("/metrics of the health port answers %d (%v)", code, err)
	}
}
