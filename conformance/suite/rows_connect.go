package suite

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	h := func(id string, need Need, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: need, Side: ServerSide, Scripted: true, Run: run})
	}
	h("H01", Must, "success: exactly the status line", rowConnectSuccess)
	h("H02", Must, "data sent together with the request", rowConnectEarlyData)
	h("H03", Must, "failed dial: 502 with the agent's text", rowConnectRefused)
	h("H04", Must, "failed dial: 504 for timeouts, 503 for too many open files", rowConnectStatuses)
	h("H05", Must, "no agent: 500", rowConnectNoAgent)
	h("H06", Must, "agent gone while pending: 502", rowConnectAgentGone)
	h("H07", Must, "--backend-dial-timeout: 504", rowConnectDialTimeout)
	h("H08", Should, "other method: 405, connection kept", rowConnectMethod)
	h("H09", Should, "garbage: 400", rowConnectGarbage)
	h("H10", Should, "HTTP/1.0, missing Host", rowConnectOld)
	h("H11", Must, "client EOF or reset: CLOSE_REQ", rowConnectClientEOF)
	h("H13", Must, "target closes: socket closed after all data", rowConnectTargetCloses)
	h("H14", Should, "http_connections gauge; mutual TLS; no h2", rowConnectGaugeTLS)
	register(Row{ID: "H15", Title: "target speaks first: status line first, then all bytes", Need: Differ, Side: ServerSide, Alone: true, Timeout: 120 * time.Second, Run: rowGreetConnect})
}

// wantBytes reads exactly these bytes.
func (t *T) wantBytes(conn net.Conn, want string) {
	buf := make([]byte, len(want))
	conn.SetReadDeadline(time.Now().Add(patience))
	n, err := io.ReadFull(conn, buf)
	if err != nil || string(buf) != want {
		t.Fatalf("want %q, got %q (%v)", want[:min(len(want), 100)], buf[:min(n, 200)], err)
	}
}

// wantNothing checks that nothing arrives and that the connection stays open.
func (t *T) wantNothing(conn net.Conn, d time.Duration) {
	conn.SetReadDeadline(time.Now().Add(d))
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("unexpected %q (%v)", buf[:n], err)
	}
	conn.SetReadDeadline(time.Time{})
}

// wantEOF reads to the end and checks that nothing was left.
func (t *T) wantEOF(conn net.Conn) {
	conn.SetReadDeadline(time.Now().Add(patience))
	rest, err := io.ReadAll(conn)
	if err != nil || len(rest) > 0 {
		t.Fatalf("want EOF, got %q (%v)", rest[:min(len(rest), 100)], err)
	}
}

// openConnect opens a tunnel whose agent has accepted.
func (s *Server) openConnect(a *FakeAgent, connID int64) net.Conn {
	conn := s.MustFront()
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.Accept(connID)
	s.t.wantBytes(conn, established)
	return conn
}

func both(t *T, o ServerOpts, f func(*Server)) {
	for _, uds := range []bool{false, true} {
		o.UDS = uds
		s := t.StartServer(o)
		f(s)
		s.Kill()
	}
}

func rowConnectSuccess(t *T) {
	both(t, ServerOpts{Mode: modeConnect}, func(s *Server) {
		a := s.FakeAgent("a")
		conn := s.MustFront()
		fmt.Fprintf(conn, "CONNECT a.host:1 HTTP/1.1\r\nHost: b.host:2\r\n\r\n")
		r := a.WantDial()
		if r.Protocol != "tcp" || r.Address != "a.host:1" || r.Random < 0 {
			t.Errorf("dialled %v", r)
		}
		t.wantNothing(conn, 100*time.Millisecond)
		a.Send(dialRsp(r.Random, 1))
		t.wantBytes(conn, established)
		t.wantNothing(conn, 200*time.Millisecond)
		conn.Write([]byte("up"))
		a.Want(data(1, []byte("up")))
		a.Send(data(1, []byte("down")))
		t.wantBytes(conn, "down")
	})
}

func rowConnectEarlyData(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	conn := s.MustFront()
	early := strings.Repeat("early bird ", 500)
	fmt.Fprintf(conn, "CONNECT a.host:1 HTTP/1.1\r\nHost: a.host:1\r\n\r\n%s", early)
	r := a.WantDial()
	a.Silence(200 * time.Millisecond)
	a.Send(dialRsp(r.Random, 1))
	if got := a.Collect(1, len(early)); string(got) != early {
		t.Errorf("early data changed")
	}
	t.wantBytes(conn, established)
	conn.Write([]byte("more"))
	a.Want(data(1, []byte("more")))
}

// refusal asks for a tunnel and answers the dial with an error.
func (s *Server) refusal(a *FakeAgent, text string) answer {
	conn := s.MustFront()
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	r := a.WantDial()
	a.Send(dialErr(r.Random, text))
	got, err := readAnswer(conn)
	s.t.Check(err, "answer to a failed dial")
	return got
}

func (t *T) wantRefusal(got answer, status, body string) {
	if got.Status != "HTTP/1.1 "+status || got.Body != body {
		t.Errorf("answered %q %q, want %q %q", got.Status, got.Body, status, body)
	}
	if ct := got.Header.Get("Content-Type"); ct != "text/plain; charset=utf-8" {
		t.Errorf("Content-Type is %q", ct)
	}
}

func rowConnectRefused(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	texts := []string{
		"dial tcp 127.0.0.1:1: connect: connection refused",
		"dial tcp: lookup nowhere on 10.0.0.10:53: no such host",
		"dial tcp: address 127.0.0.1: missing port in address",
		"dial tcp 10.0.0.1:1: connect: no route to host",
		"something else",
	}
	for _, text := range texts {
		got := s.refusal(a, text)
		t.wantRefusal(got, "502 Bad Gateway", text)
		if got.Header.Get("Connection") != "close" || len(got.Header) != 2 {
			t.Errorf("headers are %v", got.Header)
		}
	}
	t.WantDialFailures(s, nil, map[string]float64{"error_response": float64(len(texts))}, nil)
	s.WantMetric(0, "pending_backend_dials")
	s.WantMetric(0, "established_connections")
	a.Silence(100 * time.Millisecond)
}

func rowConnectStatuses(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	for text, status := range map[string]string{
		"dial tcp 198.18.0.254:1234: i/o timeout":            "504 Gateway Timeout",
		"context deadline exceeded":                          "504 Gateway Timeout",
		"TLS handshake TIMEOUT":                              "504 Gateway Timeout",
		"dial tcp 127.0.0.1:80: socket: too many open files": "503 Service Unavailable",
		"Too Many Open Files":                                "503 Service Unavailable",
		"too many open files, timeout":                       "504 Gateway Timeout",
		"dial foo: unknown network foo":                      "502 Bad Gateway",
	} {
		t.wantRefusal(s.refusal(a, text), status, text)
	}
}

func rowConnectNoAgent(t *T) {
	both(t, ServerOpts{Mode: modeConnect}, func(s *Server) {
		conn := s.MustFront()
		fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
		t.wantBytes(conn, "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\ncurrently no tunnels available: No agent available")
		t.wantEOF(conn)
		s.WantMetric(0, "http_connections")
	})
}

func rowConnectAgentGone(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	conn := s.MustFront()
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.WantDial()
	a.hangUp()
	got, err := readAnswer(conn)
	t.Check(err, "answer")
	t.wantRefusal(got, "502 Bad Gateway", "Backend context error: context canceled\r\n")
	t.WantDialFailures(s, nil, map[string]float64{"backend_close": 1}, nil)
	s.WantMetric(0, "pending_backend_dials")
}

func rowConnectDialTimeout(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect, Args: []string{"--backend-dial-timeout", "1s"}})
	a := s.FakeAgent("a")
	conn := s.MustFront()
	begin := time.Now()
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.WantDial()
	got, err := readAnswer(conn)
	t.Check(err, "answer")
	t.wantRefusal(got, "504 Gateway Timeout", "Backend dial timeout: timed out waiting for backend dial\r\n")
	if d := time.Since(begin); d < 900*time.Millisecond || d > 2500*time.Millisecond {
		t.Errorf("answered after %v", d)
	}
	s.WantMetric(0, "pending_backend_dials")
	s.WaitBackends(1)
	t.WantDialFailures(s, nil, map[string]float64{"backend_dial_timeout": 1}, nil)

	a.Drain(100 * time.Millisecond)
	flooder := s.openConnect(a, 1)
	a.StopReading()
	go func() {
		for {
			if _, err := flooder.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	}()
	t.Sleep(time.Second)
	conn = s.MustFront()
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	got, err = readAnswer(conn)
	t.Check(err, "answer while the agent does not read")
	t.wantRefusal(got, "504 Gateway Timeout", "Failed to tunnel dial request: timed out waiting for backend dial\r\n")
	s.WaitBackends(0)
	s.WantMetric(0, "pending_backend_dials")
	a.GoOnReading()
	a.WantAnyEnd()
	t.WantDialFailures(s, nil, map[string]float64{"backend_dial_timeout": 2}, nil)
}

func rowConnectMethod(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	conn := s.MustFront()
	for _, method := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "POST http://x/y HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"} {
		io.WriteString(conn, method)
		var raw []byte
		conn.SetReadDeadline(time.Now().Add(patience))
		for !bytes.HasSuffix(raw, []byte("passthrough\n")) {
			buf := make([]byte, 1000)
			n, err := conn.Read(buf)
			t.Check(err, "answer to another method, after %q", raw)
			raw = append(raw, buf[:n]...)
		}
		got, err := parseAnswer(raw)
		t.Check(err, "answer")
		t.wantRefusal(got, "405 Method Not Allowed", "this proxy only supports CONNECT passthrough\n")
		if got.Header.Get("X-Content-Type-Options") != "nosniff" || got.Header.Get("Content-Length") != "45" {
			t.Errorf("headers are %v", got.Header)
		}
	}
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.Accept(1)
	t.wantBytes(conn, established)
}

func rowConnectGarbage(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	for _, garbage := range []string{"garbage\r\n\r\n", "CONNECT\r\n\r\n", "\x00\x01\x02\xff\r\n\r\n", "GET / HTTP/1.1\r\nno colon here\r\n\r\n"} {
		conn := s.MustFront()
		io.WriteString(conn, garbage)
		got, err := readAnswer(conn)
		t.Check(err, "answer to %q", garbage)
		t.wantRefusal(got, "400 Bad Request", "400 Bad Request")
		if got.Header.Get("Connection") != "close" {
			t.Errorf("headers are %v", got.Header)
		}
	}
}

func rowConnectOld(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect})
	a := s.FakeAgent("a")
	for i, request := range []string{
		"CONNECT some.host:443 HTTP/1.0\r\n\r\n",
		"CONNECT some.host:443 HTTP/1.1\r\n\r\n",
		"CONNECT some.host:443 HTTP/1.0\r\nHost: other:1\r\nUser-Agent: x\r\nProxy-Connection: keep-alive\r\n\r\n",
	} {
		conn := s.MustFront()
		io.WriteString(conn, request)
		if r := a.Accept(int64(i + 1)); r.Address != "some.host:443" {
			t.Errorf("%q dials %q", request, r.Address)
		}
		t.wantBytes(conn, established)
		conn.Write([]byte("x"))
		a.Want(data(int64(i+1), []byte("x")))
	}
}

func rowConnectClientEOF(t *T) {
	both(t, ServerOpts{Mode: modeConnect, Linger: "2s"}, func(s *Server) {
		a := s.FakeAgent("a")
		conn := s.openConnect(a, 1)
		conn.Write([]byte("last words"))
		conn.Close()
		a.Want(data(1, []byte("last words")))
		begin := time.Now()
		r, ok := a.next(patience)
		if !ok || r.pkt.GetType() != pb.PacketType_CLOSE_REQ || r.pkt.GetCloseRequest().GetConnectID() != 1 {
			t.Fatalf("after the client's EOF the agent was sent %v", r.pkt)
		}
		if d := time.Since(begin); d > time.Second {
			t.Notef("CLOSE_REQ %v after the client's EOF", d.Round(time.Millisecond))
		}
		if s.UDS != "" {
			return
		}
		raw, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Front))
		t.Check(err, "connect")
		c := tls.Client(raw, t.env.Certs.clientTLS(false))
		fmt.Fprintf(c, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
		a.Accept(2)
		t.wantBytes(c, established)
		begin = time.Now()
		reset(raw.(*net.TCPConn))
		a.Want(closeReq(2))
		if d := time.Since(begin); d > time.Second {
			t.Errorf("CLOSE_REQ %v after a reset", d)
		}
	})
}

func rowConnectTargetCloses(t *T) {
	both(t, ServerOpts{Mode: modeConnect}, func(s *Server) {
		a := s.FakeAgent("a")
		conn := s.openConnect(a, 1)
		var want bytes.Buffer
		var pkts []*pb.Packet
		for i := range 100 {
			piece := bytes.Repeat([]byte{byte(i)}, 1000*(1+i%30))
			want.Write(piece)
			pkts = append(pkts, data(1, piece))
		}
		go func() {
			for _, p := range append(pkts, closeRsp(1, "")) {
				a.TrySend(marshal(p))
			}
		}()
		t.wantBytes(conn, want.String())
		t.wantEOF(conn)
		s.WantMetric(0, "established_connections")
	})
}

func rowConnectGaugeTLS(t *T) {
	s := t.StartServer(ServerOpts{Mode: modeConnect, Linger: "1s"})
	a := s.FakeAgent("a")
	s.WantMetric(0, "http_connections")
	c1, c2 := s.openConnect(a, 1), s.openConnect(a, 2)
	s.WantMetric(2, "http_connections")
	a.Send(closeRsp(1, ""))
	t.wantEOF(c1)
	s.WantMetric(1, "http_connections")
	c2.Close()
	// Go also asks the agent to close the connection that it has closed.
	p := a.Next()
	if p.Type == pb.PacketType_CLOSE_REQ && p.GetCloseRequest().GetConnectID() == 1 {
		p = a.Next()
	}
	if p.Type != pb.PacketType_CLOSE_REQ || p.GetCloseRequest().GetConnectID() != 2 {
		t.Errorf("received %s, want CLOSE_REQ{2}", show(p))
	}
	a.Send(closeRsp(2, ""))
	s.WantMetric(0, "http_connections")
	t.wantTLSRefused(s.Front, &tls.Config{InsecureSkipVerify: true}, "no client certificate")
	t.wantTLSRefused(s.Front, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{t.env.Certs.ForeignClient.TLS}}, "foreign client certificate")
	t.wantTLSRefused(s.Front, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{t.env.Certs.Agent.TLS}}, "an agent's certificate")
	conn := s.MustFront("h2", "http/1.1")
	if p := conn.(*tls.Conn).ConnectionState().NegotiatedProtocol; p == "h2" {
		t.Errorf("h2 was negotiated")
	}
	fmt.Fprintf(conn, "CONNECT some.host:443 HTTP/1.1\r\nHost: some.host:443\r\n\r\n")
	a.Accept(3)
	t.wantBytes(conn, established)
}

// wantTLSRefused connects and checks that the server ends the connection
// without an answer. With TLS 1.3 the client learns of it at the first read.
func (t *T) wantTLSRefused(port int, cfg *tls.Config, what string) {
	raw, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	t.Check(err, "connect")
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	conn := tls.Client(raw, cfg)
	if conn.Handshake() != nil {
		return
	}
	buf := make([]byte, 1)
	_, err = conn.Read(buf)
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection was not refused (%v)", what, err)
	}
}

func rowGreetConnect(t *T) {
	target := t.greeter()
	for _, uds := range []bool{false, true} {
		s, a := t.StartPair(ServerOpts{Mode: modeConnect, UDS: uds}, AgentOpts{})
		via := "mTLS"
		if uds {
			via = "UDS"
		}
		r := t.konnbench(s, target.Addr, "--transport", "connect", "--mode", "greet", "--count", "300", "--size", "65536", "--timeout", "3s")
		t.Notef("CONNECT over %s: %v of 300 greetings heard", via, r["heard"])
		if heard, _ := r["heard"].(float64); heard < 300 {
			t.ServerDiffers("CONNECT over %s: %v of 300 greetings heard, errors %v", via, heard, r["errors"])
		}
		s.Kill()
		a.Kill()
	}
}
