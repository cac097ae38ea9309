package suite

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/metadata"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	e := func(id string, need Need, side Side, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: need, Side: side, Scripted: true, Run: run})
	}
	e("E01", Differ, ServerSide, "extension: offers that are accepted, and that are not", rowServerAccepts)
	e("E02", Must, ServerSide, "extension: nothing of it for, nor from, peers that do not offer it", rowServerPlain)
	e("E03", Differ, ServerSide, "CREDIT comes as the client takes its bytes", rowServerGrants)
	e("E04", Differ, ServerSide, "CREDIT stops for a client that does not read, not for others; overdraft: RESET", rowServerStopsGranting)
	e("E05", Differ, ServerSide, "the agent's credit is kept: 64 KiB, then what CREDIT brings", rowServerKeepsCredit)
	e("E06", Differ, ServerSide, "HALF_CLOSE both ways, gRPC and CONNECT, beside plain peers", rowServerHalfClose)
	e("E07", Differ, ServerSide, "RESET both ways, gRPC and CONNECT, beside plain peers", rowServerReset)
	e("E08", Differ, ServerSide, "extension packets without sense are ignored", rowServerNonsense)
	e("E11", Must, AgentSide, "extension: nothing of it for, nor from, a server that does not accept it", rowAgentPlain)
	e("E12", Differ, AgentSide, "the server's credit is kept: 64 KiB, then what CREDIT brings", rowAgentKeepsCredit)
	e("E13", Differ, AgentSide, "CREDIT comes as the target takes its bytes", rowAgentGrants)
	e("E14", Differ, AgentSide, "CREDIT stops for a target that does not read, not for others; overdraft: RESET", rowAgentStopsGranting)
	e("E15", Differ, AgentSide, "HALF_CLOSE both ways", rowAgentHalfClose)
	e("E16", Differ, AgentSide, "RESET both ways", rowAgentReset)
	e("E17", Differ, AgentSide, "extension packets without sense are ignored", rowAgentNonsense)
	register(Row{ID: "E20", Title: "a frozen peer of ours is noticed within 15 s", Need: Differ, Side: bothSides, Pairings: []Pairing{{Our, Our}}, Timeout: 90 * time.Second, Run: rowFrozenPeer})
}

// hashed are n random bytes that belong to a seed.
func hashed(seed uint64, n int) []byte {
	b := make([]byte, n)
	newSource(seed).rng.Read(b)
	return b
}

func rowServerAccepts(t *T) {
	s := t.StartServer(ServerOpts{})
	for i, c := range []struct {
		offers []string
		want   string
	}{
		{[]string{"1"}, "1"},
		{[]string{"2, 1"}, "1"},
		{[]string{"2,1"}, "1"},
		{[]string{"2", "1"}, "1"},
		{[]string{"2"}, ""},
		{[]string{"11, 1.0, x"}, ""},
		{[]string{""}, ""},
		{nil, ""},
	} {
		a := s.OfferingAgent(fmt.Sprint("agent-", i), c.offers...)
		if got := strings.Join(a.Header.Get(extensionKey), "|"); got != c.want {
			t.Errorf("agent's offer %q: accepted %q, want %q", c.offers, got, c.want)
		}
		client := s.OfferingClient("client", c.offers...)
		client.Send(dialReq(1, "127.0.0.1:80"))
		a.Accept(1)
		client.Want(dialRsp(1, 1))
		if got := strings.Join(client.Accepted(), "|"); got != c.want {
			t.Errorf("client's offer %q: accepted %q, want %q", c.offers, got, c.want)
		}
		client.Send(data(1, []byte("up")))
		a.Want(data(1, []byte("up")))
		a.Send(data(1, []byte("down")))
		client.Want(data(1, []byte("down")))
		a.hangUp()
		s.WaitBackends(0)
	}
}

func rowServerPlain(t *T) {
	s := t.StartServer(ServerOpts{})
	for _, offer := range []string{"", "2"} {
		var a *FakeAgent
		var c *stream
		if offer == "" {
			a = s.FakeAgent("plain")
			c = s.Client("client")
		} else {
			a = s.OfferingAgent("of another version", offer)
			c = s.OfferingClient("client", offer)
		}
		if got := a.Header.Get(extensionKey); len(got) > 0 {
			t.Errorf("offer %q of an agent is answered with %q", offer, got)
		}
		c.Send(dialReq(1, "127.0.0.1:80"))
		a.Accept(1)
		c.Want(dialRsp(1, 1))
		if got := c.Accepted(); len(got) > 0 {
			t.Errorf("offer %q of a client is answered with %q", offer, got)
		}
		// They have not agreed: what they send of it is of an unknown type.
		for _, p := range []*pb.Packet{credit(1, 1), halfClose(1), resetPacket(1, "no")} {
			a.Send(p)
			c.Send(p)
		}
		c.Send(data(1, []byte("up")))
		a.Want(data(1, []byte("up")))
		a.Send(data(1, []byte("down")))
		c.Want(data(1, []byte("down")))
		// Collect fails at the first packet that is not DATA, CREDIT above all.
		up, down := hashed(1, 1<<20), hashed(2, 1<<20)
		go func() {
			for i := 0; i < len(up); i += 32 << 10 {
				c.TrySend(marshal(data(1, up[i:i+32<<10])))
			}
		}()
		go func() {
			for i := 0; i < len(down); i += 32 << 10 {
				a.TrySend(marshal(data(1, down[i:i+32<<10])))
			}
		}()
		if got := a.Collect(1, len(up)); !bytes.Equal(got, up) {
			t.Errorf("bytes to the agent have changed")
		}
		if got := c.Collect(1, len(down)); !bytes.Equal(got, down) {
			t.Errorf("bytes to the client have changed")
		}
		c.Send(closeReq(1))
		a.Want(closeReq(1))
		a.Send(closeRsp(1, ""))
		c.Want(closeRsp(1, ""))
		a.Silence(100 * time.Millisecond)
		a.hangUp()
		s.WaitBackends(0)
	}
}

func rowServerGrants(t *T) {
	s := t.StartServer(ServerOpts{})
	a, ok := s.ExtensionAgent("a")
	if !ok {
		return
	}
	payload := hashed(3, 8<<20)
	from := newSender(a.stream)
	for i, piece := range []int{32 << 10, 1000, 1 << 20} {
		id := int64(i + 1)
		want := payload[:min(len(payload), 200*piece)]
		c := s.Client("client")
		c.Send(dialReq(id, "127.0.0.1:80"))
		if p := from.wantInbox(); show(p) != show(dialReq(id, "127.0.0.1:80")) {
			t.Fatalf("the agent was sent %s", show(p))
		}
		a.Send(dialRsp(id, id))
		c.Want(dialRsp(id, id))
		from.opened(id)
		if sent := from.sendWithin(id, want, piece, patience); sent != len(want) {
			t.Fatalf("pieces of %d bytes: no more credit after %d of %d bytes", piece, sent, len(want))
		}
		if got := c.Collect(id, len(want)); !bytes.Equal(got, want) {
			t.Errorf("pieces of %d bytes: the bytes have changed", piece)
		}
		a.Send(closeRsp(id, ""))
		c.Want(closeRsp(id, ""))
	}
}

func rowServerStopsGranting(t *T) {
	s := t.StartServer(ServerOpts{})
	a, ok := s.ExtensionAgent("a")
	if !ok {
		return
	}
	from := newSender(a.stream)
	other := s.Establish(a, 100, 1)
	c := s.Establish(a, 200, 2)
	c.StopReading()
	from.opened(1)
	from.opened(2)
	payload := hashed(4, 16<<20)
	sent := from.sendWithin(2, payload, 32<<10, time.Second)
	t.Notef("%d KiB were granted to a client that does not read", from.total[2]>>10)
	if most := int64(initialCredit + maxGrant + 2*smallWindow); from.total[2] > most {
		t.Errorf("a client that does not read: %d bytes were granted", from.total[2])
	}
	alive := func() {
		for i := range 20 {
			p := data(1, []byte{byte(i)})
			a.Send(p)
			other.Want(p)
		}
	}
	alive()
	c.GoOnReading()
	sent += from.sendWithin(2, payload[sent:], 32<<10, patience)
	if sent != len(payload) {
		t.Fatalf("no more credit after %d of %d bytes although the client reads", sent, len(payload))
	}
	if got := c.Collect(2, len(payload)); !bytes.Equal(got, payload) {
		t.Errorf("the bytes have changed")
	}
	// An agent that takes what it has not got.
	for from.take(0) {
	}
	c.StopReading()
	for range 64 << 20 / (64 << 10) {
		if a.TrySend(marshal(data(2, make([]byte, 64<<10)))) != nil || len(from.inbox) > 0 {
			break
		}
		for from.take(0) {
		}
	}
	if e := parseExtension(from.wantInbox()); e == nil || e.kind != typeReset || e.connID != 2 || e.reason == "" {
		t.Fatalf("DATA without credit was answered with %v, want RESET{2}", e)
	}
	alive()
	c.GoOnReading()
	for {
		p := c.Next()
		if p.Type == pb.PacketType_CLOSE_RSP {
			if p.GetCloseResponse().GetError() == "" {
				t.Errorf("the client is not told why its connection was reset")
			}
			break
		}
	}
	s.WantMetric(1, "established_connections")
}

// wantCreditKept receives DATA until the sender stops, and checks that it
// began no message that far beyond its credit.
func (t *T) wantCreditKept(s *stream, connID, granted int64, got *[]byte) {
	var used, last int64
	for {
		r, ok := s.next(700 * time.Millisecond)
		if !ok {
			break
		}
		e := parseExtension(r.pkt)
		if e != nil && e.kind == typeCredit {
			continue
		}
		if r.pkt.GetType() != pb.PacketType_DATA || r.pkt.GetData().GetConnectID() != connID {
			t.Fatalf("%s: unexpected %s", s.name, show(r.pkt))
		}
		last = int64(len(r.raw)) + grpcPrefix
		used += last
		*got = append(*got, r.pkt.GetData().GetData()...)
	}
	if used < granted {
		t.Fatalf("%s: with a credit of %d bytes only %d were sent", s.name, granted, used)
	}
	if used-last >= granted+overrun {
		t.Fatalf("%s: with a credit of %d bytes %d were sent, the last message of %d", s.name, granted, used, last)
	}
	// What goes over is owed.
	s.overdraft = used - granted
}

func rowServerKeepsCredit(t *T) {
	run := func(o ServerOpts) {
		s := t.StartServer(o)
		a, ok := s.ExtensionAgent("a")
		if !ok {
			return
		}
		payload := hashed(5, 1<<20)
		if o.Mode == modeConnect {
			conn := s.openConnect(a, 1)
			go conn.Write(payload)
		} else {
			c := s.Establish(a, 100, 1)
			go func() {
				for i := 0; i < len(payload); i += 16 << 10 {
					c.TrySend(marshal(data(1, payload[i:i+16<<10])))
				}
			}()
		}
		var got []byte
		t.wantCreditKept(a.stream, 1, initialCredit, &got)
		for _, more := range []int64{100_000, 1, 200_000} {
			if owed := a.overdraft; owed >= more {
				a.Send(credit(1, owed))
				a.overdraft = 0
			}
			usable := more - a.overdraft
			a.Send(credit(1, more))
			t.wantCreditKept(a.stream, 1, usable, &got)
		}
		// Nobody else waits for it.
		if o.Mode == modeConnect {
			s.openConnect(a, 2).Write([]byte("passes by"))
		} else {
			s.Establish(a, 200, 2).Send(data(2, []byte("passes by")))
		}
		a.Want(data(2, []byte("passes by")))
		a.Send(credit(1, 4<<20))
		got = append(got, a.Collect(1, len(payload)-len(got))...)
		if !bytes.Equal(got, payload) {
			t.Errorf("the bytes have changed")
		}
		s.Kill()
	}
	run(ServerOpts{})
	run(ServerOpts{Mode: modeConnect})
}

func rowServerHalfClose(t *T) {
	const linger = 2 * time.Second
	s := t.StartServer(ServerOpts{Linger: linger.String()})
	a, ok := s.ExtensionAgent("a")
	if !ok {
		return
	}
	// The client ends first.
	c := s.EstablishWith(a, 101, 1)
	c.Send(data(1, []byte("request")), halfClose(1), halfClose(1))
	a.Want(data(1, []byte("request")), halfClose(1))
	a.Silence(linger + 300*time.Millisecond)
	a.Send(data(1, []byte("answer")), closeRsp(1, ""))
	c.Want(data(1, []byte("answer")), closeRsp(1, ""))
	// The service ends first, and the client goes on.
	for _, end := range []*pb.Packet{closeReq(2), halfClose(2)} {
		c = s.EstablishWith(a, 102, 2)
		a.Send(data(2, []byte("greeting")), halfClose(2))
		c.Want(data(2, []byte("greeting")), halfClose(2))
		c.Send(data(2, []byte("late words")))
		a.Want(data(2, []byte("late words")))
		c.Send(end)
		a.Want(end)
		a.Send(closeRsp(2, ""))
		c.Want(closeRsp(2, ""))
	}
	// A plain client has no word for the service's end.
	c = s.Establish(a, 103, 3)
	a.Send(data(3, []byte("bye")), halfClose(3))
	c.Want(data(3, []byte("bye")), closeRsp(3, ""))
	a.Want(closeReq(3))
	a.Send(closeRsp(3, ""))
	a.hangUp()
	s.WaitBackends(0)
	// A plain agent has none for the client's: CLOSE_REQ is held back.
	a = s.FakeAgent("plain")
	c = s.EstablishWith(a, 104, 4)
	c.Send(data(4, []byte("request")), halfClose(4))
	a.Want(data(4, []byte("request")))
	a.Silence(linger / 2)
	a.Send(data(4, []byte("answer")), closeRsp(4, ""))
	c.Want(data(4, []byte("answer")), closeRsp(4, ""))
	c = s.EstablishWith(a, 105, 5)
	begin := time.Now()
	c.Send(halfClose(5))
	a.Want(closeReq(5))
	if d := time.Since(begin); d < linger-200*time.Millisecond || d > linger+1500*time.Millisecond {
		t.Errorf("CLOSE_REQ %v after the client's end, want %v", d, linger)
	}
	s.Kill()

	both(t, ServerOpts{Mode: modeConnect}, func(s *Server) {
		a, ok := s.ExtensionAgent("a")
		if !ok {
			return
		}
		closeWrite := func(conn net.Conn) {
			t.Check(conn.(interface{ CloseWrite() error }).CloseWrite(), "half-close")
		}
		conn := s.openConnect(a, 1)
		conn.Write([]byte("request"))
		closeWrite(conn)
		a.Want(data(1, []byte("request")), halfClose(1))
		a.Silence(300 * time.Millisecond)
		a.Send(data(1, []byte("answer")), closeRsp(1, ""))
		t.wantBytes(conn, "answer")
		t.wantEOF(conn)

		conn = s.openConnect(a, 2)
		a.Send(data(2, []byte("greeting")), halfClose(2))
		t.wantBytes(conn, "greeting")
		t.wantEOF(conn)
		conn.Write([]byte("late words"))
		a.Want(data(2, []byte("late words")))
		conn.Close()
		a.Want(halfClose(2))
		a.Send(closeRsp(2, ""))
		s.WantMetric(0, "established_connections")
	})
}

// wantTCPReset reads until the connection ends, which must be by a reset.
func (t *T) wantTCPReset(c net.Conn, what string) {
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: the connection ended with %v, want a reset", what, err)
	}
}

// rawConnect is openConnect that also hands out the TCP connection beneath.
func (s *Server) rawConnect(a *FakeAgent, connID int64) (*tls.Conn, *net.TCPConn) {
	raw, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Front))
	s.t.Check(err, "connect")
	s.t.Cleanup(func() { raw.Close() })
	c := tls.Client(raw, s.t.env.Certs.clientTLS(false))
	fmt.Fprintf(c, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.Accept(connID)
	s.t.wantBytes(c, established)
	return c, raw.(*net.TCPConn)
}

func rowServerReset(t *T) {
	s := t.StartServer(ServerOpts{})
	a, ok := s.ExtensionAgent("a")
	if !ok {
		return
	}
	// From the service: the reason goes on to those who understand it.
	c := s.EstablishWith(a, 101, 1)
	a.Send(data(1, []byte("x")), resetPacket(1, "connection reset by peer"))
	c.Want(data(1, []byte("x")))
	p := c.Next()
	if e := parseExtension(p); e == nil || e.kind != typeReset || e.connID != 1 || e.reason != "connection reset by peer" {
		t.Fatalf("an agent's RESET arrives as %s", show(p))
	}
	c = s.Establish(a, 102, 2)
	a.Send(resetPacket(2, "connection reset by peer"))
	if p := c.Next(); p.Type != pb.PacketType_CLOSE_RSP || p.GetCloseResponse().GetConnectID() != 2 {
		t.Fatalf("an agent's RESET arrives at a plain client as %s", show(p))
	}
	// From the client. Nothing is answered, and what comes late is dropped.
	c = s.EstablishWith(a, 103, 3)
	c.Send(resetPacket(3, "given up"))
	p = a.Next()
	if e := parseExtension(p); e == nil || e.kind != typeReset || e.connID != 3 || e.reason == "" {
		t.Fatalf("a client's RESET arrives as %s", show(p))
	}
	a.Send(closeRsp(3, ""))
	c.Silence(200 * time.Millisecond)
	a.Silence(100 * time.Millisecond)
	s.WantMetric(0, "established_connections")
	// A plain agent is told by CLOSE_REQ.
	a.hangUp()
	s.WaitBackends(0)
	a = s.FakeAgent("plain")
	c = s.EstablishWith(a, 104, 4)
	c.Send(resetPacket(4, "given up"))
	a.Want(closeReq(4))
	s.Kill()

	s = t.StartServer(ServerOpts{Mode: modeConnect})
	a, _ = s.ExtensionAgent("a")
	_, raw := s.rawConnect(a, 1)
	a.Send(resetPacket(1, "connection reset by peer"))
	t.wantTCPReset(raw, "RESET of an agent")
	_, raw = s.rawConnect(a, 2)
	reset(raw)
	p = a.Next()
	if e := parseExtension(p); e == nil || e.kind != typeReset || e.connID != 2 || e.reason == "" {
		t.Errorf("a client's reset arrives as %s", show(p))
	}
	s.WantMetric(0, "established_connections")
}

// nonsense are packets of the extension that mean nothing for connection id.
func nonsense(id int64) []*pb.Packet {
	return []*pb.Packet{
		credit(77, 1000), halfClose(77), resetPacket(77, "who?"), credit(0, 1), halfClose(0), resetPacket(0, ""),
		credit(id, 0), credit(id, -5),
		{Type: typeCredit}, {Type: typeHalfClose}, {Type: typeReset}, {Type: 1004},
		extensionPacket(typeCredit, nil), extensionPacket(1004, []byte{8, 1}),
	}
}

func rowServerNonsense(t *T) {
	s := t.StartServer(ServerOpts{})
	a, ok := s.ExtensionAgent("a")
	if !ok {
		return
	}
	c := s.EstablishWith(a, 100, 1)
	bystander := s.Establish(a, 200, 2)
	for _, p := range nonsense(1) {
		a.Send(p)
		if p.Type != typeCredit { // between client and server there is none
			c.Send(p)
		}
	}
	c.Send(data(1, []byte("up")))
	a.Want(data(1, []byte("up")))
	a.Send(data(1, []byte("down")))
	c.Want(data(1, []byte("down")))
	// Another client's connection.
	for _, p := range []*pb.Packet{halfClose(2), resetPacket(2, "evil")} {
		c.TrySend(marshal(p))
	}
	t.Sleep(100 * time.Millisecond)
	bystander.Send(data(2, []byte("still mine")))
	a.Want(data(2, []byte("still mine")))
	a.Send(data(2, []byte("yours")))
	bystander.Want(data(2, []byte("yours")))
}

func rowAgentPlain(t *T) {
	for _, answer := range []string{"", "2"} {
		f := t.FakeServer("s")
		if answer != "" {
			f.Header = func(int) metadata.MD {
				return metadata.Pairs("serverid", "s", "servercount", "1", extensionKey, answer)
			}
		}
		a, s := t.agentOf(f, AgentOpts{})
		g := t.Target(nil)
		id := s.Dial(1, g.Addr)
		c := t.Accept(g)
		for _, p := range []*pb.Packet{credit(id, 1), halfClose(id), resetPacket(id, "no")} {
			s.Send(p)
		}
		up, down := hashed(1, 1<<20), hashed(2, 1<<20)
		go func() {
			for i := 0; i < len(up); i += 32 << 10 {
				s.TrySend(marshal(data(id, up[i:i+32<<10])))
			}
		}()
		go c.Write(down)
		got := make([]byte, len(up))
		_, err := io.ReadFull(c, got)
		t.Check(err, "read at the target")
		if !bytes.Equal(got, up) {
			t.Errorf("bytes to the target have changed")
		}
		if got := s.Collect(id, len(down)); !bytes.Equal(got, down) {
			t.Errorf("bytes from the target have changed")
		}
		c.CloseWrite()
		s.Want(closeRsp(id, ""))
		s.Silence(100 * time.Millisecond)
		a.Kill()
	}
}

func rowAgentKeepsCredit(t *T) {
	_, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	payload := hashed(5, 2<<20)
	g := t.Target(func(c *net.TCPConn) { c.Write(payload); c.Read(make([]byte, 1)) })
	echo := t.Echo()
	id := s.Dial(1, g.Addr)
	var got []byte
	t.wantCreditKept(s.stream, id, initialCredit, &got)
	for _, more := range []int64{100_000, 1, 300_000} {
		if owed := s.overdraft; owed >= more {
			s.Send(credit(id, owed))
			s.overdraft = 0
		}
		usable := more - s.overdraft
		s.Send(credit(id, more))
		t.wantCreditKept(s.stream, id, usable, &got)
	}
	other := s.Dial(2, echo.Addr)
	s.Send(data(other, []byte("passes by")))
	s.Want(data(other, []byte("passes by")))
	s.Send(credit(id, 4<<20))
	got = append(got, s.Collect(id, len(payload)-len(got))...)
	if !bytes.Equal(got, payload) {
		t.Errorf("the bytes have changed")
	}
}

func rowAgentGrants(t *T) {
	_, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	payload := hashed(6, 8<<20)
	for i, piece := range []int{32 << 10, 1000, 1 << 20} {
		want := payload[:min(len(payload), 200*piece)]
		g := t.Target(nil)
		id := s.Dial(int64(i+1), g.Addr)
		c := t.Accept(g)
		got := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(c)
			got <- b
		}()
		to := newSender(s.stream)
		to.opened(id)
		if sent := to.sendWithin(id, want, piece, patience); sent != len(want) {
			t.Fatalf("pieces of %d bytes: no more credit after %d of %d bytes", piece, sent, len(want))
		}
		s.Send(closeReq(id))
		if p := to.wantInbox(); show(p) != show(closeRsp(id, "")) {
			t.Fatalf("CLOSE_REQ is answered with %s", show(p))
		}
		if b := <-got; !bytes.Equal(b, want) {
			t.Errorf("pieces of %d bytes: %d of %d bytes have arrived unchanged", piece, len(b), len(want))
		}
	}
}

func rowAgentStopsGranting(t *T) {
	_, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	payload := hashed(7, 24<<20)
	g, echo := t.Target(nil), t.Echo()
	to := newSender(s.stream)
	other := s.Dial(1, echo.Addr)
	to.opened(other)
	id := s.Dial(2, g.Addr)
	to.opened(id)
	c := t.Accept(g)
	c.SetReadBuffer(64 << 10)
	sent := to.sendWithin(id, payload, 32<<10, time.Second)
	t.Notef("%d KiB were granted for a target that does not read", to.total[id]>>10)
	if to.total[id] > 16<<20 { // the kernel's buffers take some MiB
		t.Errorf("a target that does not read: %d bytes were granted", to.total[id])
	}
	alive := func() {
		for i := range 20 {
			s.Send(data(other, []byte{byte(i)}))
			if got := to.wantData(other, 1); got[0] != byte(i) {
				t.Fatalf("echo of %d is %d", i, got[0])
			}
		}
	}
	alive()
	done := make(chan []byte, 1)
	resume := make(chan struct{})
	go func() {
		b := make([]byte, len(payload))
		n, _ := io.ReadFull(c, b)
		done <- b[:n]
		<-resume
		c.SetReadDeadline(time.Now().Add(patience))
		_, err := io.Copy(io.Discard, c)
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after an overdraft the target's connection ended with %v, want a reset", err)
		}
		close(done)
	}()
	sent += to.sendWithin(id, payload[sent:], 32<<10, patience)
	if sent != len(payload) {
		t.Fatalf("no more credit after %d of %d bytes although the target reads", sent, len(payload))
	}
	if !bytes.Equal(<-done, payload) {
		t.Errorf("the bytes have changed")
	}
	for range 64 << 20 / (64 << 10) {
		if s.TrySend(marshal(data(id, make([]byte, 64<<10)))) != nil || len(to.inbox) > 0 {
			break
		}
		for to.take(0) {
		}
	}
	if e := parseExtension(to.wantInbox()); e == nil || e.kind != typeReset || e.connID != id || e.reason == "" {
		t.Fatalf("DATA without credit was answered with %v, want RESET{%d}", e, id)
	}
	close(resume)
	Within(t, done, 2*patience)
	for to.take(100 * time.Millisecond) {
	}
	to.inbox = nil // DATA that was on its way may have been answered
	alive()
}

func rowAgentHalfClose(t *T) {
	a, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	g := t.Target(nil)
	// The client ends first, and the service answers to that.
	id := s.Dial(1, g.Addr)
	c := t.Accept(g)
	s.Send(data(id, []byte("request")), halfClose(id), halfClose(id))
	t.wantBytes(c, "request")
	t.wantEOF(c)
	s.Silence(300 * time.Millisecond)
	c.Write([]byte("answer"))
	s.Want(data(id, []byte("answer")))
	c.CloseWrite()
	s.Want(closeRsp(id, ""))
	a.WantMetric(0, "open_endpoint_connections")
	// With much of the data still on its way.
	id = s.Dial(2, g.Addr)
	c = t.Accept(g)
	to := newSender(s.stream)
	to.opened(id)
	payload := hashed(8, 4<<20)
	got := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(c)
		got <- b
		c.Write([]byte("thanks"))
		c.Close()
	}()
	if sent := to.sendWithin(id, payload, 32<<10, patience); sent != len(payload) {
		t.Fatalf("no more credit after %d bytes", sent)
	}
	s.Send(halfClose(id))
	if !bytes.Equal(<-got, payload) {
		t.Errorf("bytes in front of HALF_CLOSE were lost or changed")
	}
	if b := to.wantData(id, 6); string(b) != "thanks" {
		t.Errorf("received %q", b)
	}
	if p := to.wantInbox(); show(p) != show(closeRsp(id, "")) {
		t.Fatalf("received %s, want CLOSE_RSP", show(p))
	}
	// The service ends first, and the client goes on.
	for _, end := range []func(int64) *pb.Packet{halfClose, closeReq} {
		id = s.Dial(3, g.Addr)
		c = t.Accept(g)
		c.Write([]byte("greeting"))
		c.CloseWrite()
		s.Want(data(id, []byte("greeting")), halfClose(id))
		s.Send(data(id, []byte("late words")))
		t.wantBytes(c, "late words")
		s.Send(end(id))
		s.Want(closeRsp(id, ""))
		t.wantEOF(c)
	}
	a.WantMetric(0, "open_endpoint_connections")
}

func rowAgentReset(t *T) {
	a, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	g := t.Target(nil)
	id := s.Dial(1, g.Addr)
	c := t.Accept(g)
	reset(c)
	p := s.Next()
	if e := parseExtension(p); e == nil || e.kind != typeReset || e.connID != id || !strings.Contains(e.reason, "reset by peer") {
		t.Errorf("the target's reset arrives as %s", show(p))
	}
	a.WantMetric(0, "open_endpoint_connections")
	id = s.Dial(2, g.Addr)
	c = t.Accept(g)
	s.Send(resetPacket(id, "the client has gone"))
	t.wantTCPReset(c, "RESET of the server")
	s.Silence(300 * time.Millisecond)
	a.WantMetric(0, "open_endpoint_connections")
	// A half-closed one.
	id = s.Dial(3, g.Addr)
	c = t.Accept(g)
	s.Send(halfClose(id))
	t.wantEOF(c)
	s.Send(resetPacket(id, "the client has gone"))
	s.Silence(200 * time.Millisecond)
	a.WantMetric(0, "open_endpoint_connections")
}

func rowAgentNonsense(t *T) {
	_, s, ok := t.AgentWithExtension()
	if !ok {
		return
	}
	g := t.Echo()
	id := s.Dial(1, g.Addr)
	for _, p := range nonsense(id) {
		s.Send(p)
	}
	s.Silence(200 * time.Millisecond)
	s.Send(data(id, []byte("x")))
	s.Want(data(id, []byte("x")))
}

// rowFrozenPeer stops a program without closing its sockets.
func rowFrozenPeer(t *T) {
	const limit = 15*time.Second + 2500*time.Millisecond
	s, a := t.StartPair(ServerOpts{}, AgentOpts{})
	wait := func(what string, gone func() bool) {
		begin := time.Now()
		if t.poll(limit, func() error {
			if gone() {
				return nil
			}
			return errors.New("not noticed")
		}) != nil {
			t.Errorf("%s is not noticed within %v", what, limit)
			return
		}
		t.Notef("%s is noticed after %.1f s", what, time.Since(begin).Seconds())
		if d := time.Since(begin); d < 5*time.Second {
			t.Errorf("%s counts as gone after %v already", what, d)
		}
	}
	t.Check(a.Signal(syscall.SIGSTOP), "stop the agent")
	wait("a frozen agent", func() bool { return s.Metric("ready_backends", "proxy_strategy", "default") == 0 })
	t.Check(a.Signal(syscall.SIGCONT), "continue the agent")
	s.WaitBackends(1)
	a.WaitReady()
	t.Check(s.Signal(syscall.SIGSTOP), "stop the server")
	wait("a frozen server", func() bool {
		code, _, err := httpGet(a.health("/readyz"))
		return err == nil && code != 200
	})
	t.Check(s.Signal(syscall.SIGCONT), "continue the server")
	a.WaitReady()
}
