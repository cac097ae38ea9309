package suite

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"crypto/tls"

	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

const bothSides = ServerSide | AgentSide

func init() {
	i := func(id string, side Side, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: Must, Side: side, Run: run})
	}
	i("I01", bothSides, "round trip, gRPC over UDS", rowBasicGRPC)
	i("I02", bothSides, "refused dial reaches the client", rowDialRefused)
	i("I03", 0, "dead context", rowDeadContext)
	i("I04", bothSides, "request deadline with a slow target", rowRequestDeadline)
	register(Row{ID: "I05", Title: "dial cancelled while pending, mute agent", Need: Must, Side: ServerSide, Scripted: true, Run: rowDialCancelled})
	register(Row{ID: "I06", Title: "50 tunnels cancelled in mid-request", Need: Must, Side: bothSides, Timeout: 120 * time.Second, Alone: true, Run: rowManyCancelled})
	i("I07", bothSides, "agent's 5 s dial limit", rowAgentDialLimit)
	i("I08", bothSides, "tunnel context cancelled in mid-request", rowTunnelCancelled)
	i("I09", bothSides, "20 MiB response", rowLargeResponse)
	i("I10", bothSides, "round trip, CONNECT over UDS", rowBasicConnect)
	i("I11", bothSides, "unknown name, CONNECT", rowUnknownName)
	i("I12", bothSides, "refused, CONNECT", rowConnectRefusedBoth)
	i("I13", bothSides, "only agent is draining", rowAfterDrain)
	i("I14", ServerSide, "agent dies with a live connection", rowAgentDies)
	i("I15", bothSides, "new agent after death", rowAgentRestart)
	register(Row{ID: "I16", Title: "100 concurrent tunnels over two agents", Need: Must, Side: bothSides, Heavy: true, Run: rowConcurrentTunnels})
	register(Row{ID: "I17", Title: "10 x 10 MiB at once, gRPC and CONNECT", Need: Must, Side: bothSides, Heavy: true, Run: rowConcurrentDownloads})
	i("I18", bothSides, "second stream of the same agent ID joins", rowSecondStream)
	register(Row{ID: "I19", Title: "extra ALPN protocols of the agent", Need: Must, Side: AgentSide, Scripted: true, Run: rowCustomALPN})
	i("I20", bothSides, "3 servers behind a balancer", rowHighlyAvailable)
	i("I21", bothSides, "readiness before and after an agent joins, gRPC", rowReadiness)
	i("I22", bothSides, "readiness, CONNECT", rowReadinessConnect)
	register(Row{ID: "I23", Title: "agent without server: alive, not ready", Need: Must, Side: AgentSide, Scripted: true, Run: rowAgentWithoutServer})
	i("I24", AgentSide, "server restarts on the same port", rowServerRestart)
	i("I25", bothSides, "raw connection: partial reads", rowPartialReads)
	i("I27", bothSides, "dials, refusals, ends and drain as any client sees them", rowClientBasics)
	i("I26", bothSides, "normal use counts no dial failures", rowCleanShutdown)
}

func (t *T) udsPair() (*Server, *Agent) { return t.StartPair(ServerOpts{UDS: true}, AgentOpts{}) }

func (t *T) wantHello(c *http.Client, url string) {
	body, err := get(c, url)
	t.Check(err, "request through the tunnel")
	if body != "hello" {
		t.Errorf("body is %q", body)
	}
}

func (t *T) clean(s *Server, a *Agent) { t.WantDialFailures(s, a, nil, nil) }

func rowBasicGRPC(t *T) {
	s, a := t.udsPair()
	tunnel := s.MustTunnel()
	t.wantHello(tunnel.httpClient(), t.HTTP(hello))
	t.clean(s, a)
}

func rowDialRefused(t *T) {
	s, a := t.udsPair()
	tunnel := s.MustTunnel()
	_, err := get(tunnel.httpClient(), "http://"+t.closedPort()+"/")
	if err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error is %v", err)
	}
	t.WantDialFailures(s, a, map[string]float64{"error_response": 1}, map[string]float64{"unknown": 1})
	s.WantDone(tunnel)
}

func rowDeadContext(t *T) {
	s, _ := t.udsPair()
	ctx, cancel := context.WithTimeout(t.Ctx, -time.Second)
	defer cancel()
	if _, err := s.Tunnel(ctx); err == nil || !strings.Contains(err.Error(), "context deadline exceeded") {
		t.Errorf("error is %v", err)
	}
}

func rowRequestDeadline(t *T) {
	s, a := t.udsPair()
	answer := make(chan struct{})
	url := t.HTTP(func(w http.ResponseWriter, _ *http.Request) { <-answer; io.WriteString(w, "hello") })
	tunnel := s.MustTunnel()
	ctx, cancel := context.WithTimeout(t.Ctx, time.Second)
	defer cancel()
	context.AfterFunc(ctx, func() { close(answer) })
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if _, err := tunnel.httpClient().Do(req); err == nil || !strings.Contains(err.Error(), "context deadline exceeded") {
		t.Errorf("error is %v", err)
	}
	s.WantDone(tunnel)
	a.WantMetric(0, "open_endpoint_connections")
	t.clean(s, a)
}

func rowDialCancelled(t *T) {
	s := t.StartServer(ServerOpts{UDS: true})
	s.FakeAgent("mute")
	tunnel := s.MustTunnel()
	ctx, cancel := context.WithCancel(t.Ctx)
	time.AfterFunc(time.Second, cancel)
	_, err := tunnel.DialContext(ctx, "tcp", "198.18.0.254:1234")
	if _, reason := client.GetDialFailureReason(err); reason != "context" {
		t.Errorf("reason %q, error %v", reason, err)
	}
	s.WantDone(tunnel)
	t.WantDialFailures(s, nil, map[string]float64{"frontend_close": 1}, nil)
	t.Sleep(300 * time.Millisecond)
	t.WantDialFailures(s, nil, map[string]float64{"frontend_close": 1}, nil)
}

func rowManyCancelled(t *T) {
	s, a := t.udsPair()
	url := t.HTTP(func(w http.ResponseWriter, _ *http.Request) { time.Sleep(3 * time.Second); io.WriteString(w, "hello") })
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			tunnel, err := s.Tunnel(t.Ctx)
			if err != nil {
				t.Errorf("create tunnel: %v", err)
				return
			}
			defer tunnel.cancel()
			ctx, cancel := context.WithTimeout(t.Ctx, time.Second+time.Duration(n)*20*time.Millisecond)
			defer cancel()
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
			tunnel.httpClient().Do(req)
			if !Within(t, tunnel.Done(), 15*time.Second) {
				t.Errorf("tunnel %d does not end", n)
			}
		})
	}
	wg.Wait()
	t.Eventually(time.Minute, func() error {
		if n := a.Metric("open_endpoint_connections"); n != 0 {
			return fmt.Errorf("%v connections of the agent are open", n)
		}
		return nil
	})
	s.WantMetric(0, "grpc_connections", "service_method", "Proxy")
	t.clean(s, a)
}

func rowAgentDialLimit(t *T) {
	s, a := t.udsPair()
	tunnel := s.MustTunnel()
	begin := time.Now()
	_, err := tunnel.DialContext(t.Ctx, "tcp", t.blackHole())
	if _, reason := client.GetDialFailureReason(err); reason != "endpoint" || !strings.HasSuffix(err.Error(), ": i/o timeout") {
		t.Errorf("reason %q, error %v", reason, err)
	}
	if d := time.Since(begin); d < 4500*time.Millisecond || d > 7*time.Second {
		t.Errorf("failed after %v, want 5 s", d)
	}
	t.WantDialFailures(s, a, map[string]float64{"error_response": 1}, map[string]float64{"timeout": 1})
	s.WantDone(tunnel)
}

func rowTunnelCancelled(t *T) {
	s, a := t.udsPair()
	got, answer := make(chan struct{}), make(chan struct{})
	url := t.HTTP(func(w http.ResponseWriter, _ *http.Request) { close(got); <-answer; io.WriteString(w, "hello") })
	ctx, cancel := context.WithTimeout(t.Ctx, 10*time.Second)
	defer cancel()
	tunnel, err := s.Tunnel(ctx)
	t.Check(err, "create tunnel")
	go func() {
		<-got
		cancel()
		close(answer)
	}()
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	// Cancelling ends the tunnel too, and the stock client's HTTP transport may
	// see that first (one time in ten, with the Go programs).
	if _, err := tunnel.httpClient().Do(req); err == nil || !strings.Contains(err.Error(), "context canceled") && !strings.HasSuffix(err.Error(), ": EOF") {
		t.Errorf("error is %v", err)
	}
	s.WantDone(tunnel)
	a.WantMetric(0, "open_endpoint_connections")
	t.clean(s, a)
}

func sized(n, chunks int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		chunk := make([]byte, n)
		for range chunks {
			w.Write(chunk)
		}
	}
}

func rowLargeResponse(t *T) {
	s, a := t.udsPair()
	tunnel := s.MustTunnel()
	body, err := get(tunnel.httpClient(), t.HTTP(sized(2<<20, 10)))
	t.Check(err, "request")
	if len(body) != 20<<20 {
		t.Errorf("%d bytes", len(body))
	}
	t.clean(s, a)
}

func rowBasicConnect(t *T) {
	s, a := t.StartPair(ServerOpts{UDS: true, Mode: modeConnect}, AgentOpts{})
	url := t.HTTP(hello)
	conn := s.MustFront()
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", strings.Trim(strings.TrimPrefix(url, "http:"), "/"))
	br := bufio.NewReader(conn)
	rsp, err := http.ReadResponse(br, nil)
	t.Check(err, "answer")
	if rsp.StatusCode != 200 || br.Buffered() > 0 {
		t.Errorf("status %d, %d bytes behind the blank line", rsp.StatusCode, br.Buffered())
	}
	t.wantNothing(conn, 300*time.Millisecond)
	conn.SetDeadline(time.Time{})
	c := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
	t.wantHello(c, url)
	t.clean(s, a)
}

// connectAnswer asks for a tunnel that is refused.
func (s *Server) connectAnswer(address string) answer {
	conn := s.MustFront()
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", address)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	raw, err := io.ReadAll(conn)
	s.t.Check(err, "answer")
	got, err := parseAnswer(raw)
	s.t.Check(err, "answer")
	return got
}

func rowUnknownName(t *T) {
	s, a := t.StartPair(ServerOpts{UDS: true, Mode: modeConnect}, AgentOpts{})
	name := "no-such-host.invalid"
	if !lookupFails(name) {
		t.Notef("no resolver here that denies a name: not tried")
		return
	}
	got := s.connectAnswer(name + ":80")
	if !strings.HasPrefix(got.Status, "HTTP/1.1 502 ") || !strings.Contains(got.Body, "no such host") {
		t.Errorf("answered %q %q", got.Status, got.Body)
	}
	t.WantDialFailures(s, a, map[string]float64{"error_response": 1}, map[string]float64{"unknown": 1})
}

func rowConnectRefusedBoth(t *T) {
	s, a := t.StartPair(ServerOpts{UDS: true, Mode: modeConnect}, AgentOpts{})
	got := s.connectAnswer(t.closedPort())
	if !strings.HasPrefix(got.Status, "HTTP/1.1 502 ") || !strings.Contains(got.Body, "connection refused") {
		t.Errorf("answered %q %q", got.Status, got.Body)
	}
	got = s.connectAnswer("127.0.0.1")
	if !strings.HasPrefix(got.Status, "HTTP/1.1 502 ") || got.Body != "dial tcp: address 127.0.0.1: missing port in address" {
		t.Errorf("without a port: answered %q %q", got.Status, got.Body)
	}
	t.WantDialFailures(s, a, map[string]float64{"error_response": 2}, map[string]float64{"unknown": 2})
}

func rowAfterDrain(t *T) {
	s, a := t.udsPair()
	url := t.HTTP(hello)
	a.Terminate()
	t.Sleep(300 * time.Millisecond)
	for range 3 {
		t.wantHello(s.MustTunnel().httpClient(), url)
	}
	t.clean(s, a)
}

func rowAgentDies(t *T) {
	for _, mode := range []string{modeGRPC, modeConnect} {
		s, a := t.StartPair(ServerOpts{UDS: true, Mode: mode}, AgentOpts{})
		url := t.HTTP(hello)
		c := s.httpVia()
		t.wantHello(c, url)
		a.Kill()
		s.WaitBackends(0)
		c.Timeout = 10 * time.Second
		begin := time.Now()
		_, err := get(c, url)
		if d := time.Since(begin); err == nil || d > 2*time.Second {
			t.Errorf("%s: after the agent's death the request took %v: %v", mode, d, err)
		}
		s.Kill()
	}
}

func rowAgentRestart(t *T) {
	for _, mode := range []string{modeGRPC, modeConnect} {
		s, a := t.StartPair(ServerOpts{UDS: true, Mode: mode}, AgentOpts{ID: "same"})
		url := t.HTTP(hello)
		t.wantHello(s.httpVia(), url)
		a.Kill()
		s.WaitBackends(0)
		b := t.StartAgent(s.AgentPort, AgentOpts{ID: "same"})
		b.WaitReady()
		s.WaitBackends(1)
		t.wantHello(s.httpVia(), url)
		t.clean(s, b)
		b.Kill()
		s.Kill()
	}
}

func rowConcurrentTunnels(t *T) {
	s, a := t.udsPair()
	b := t.StartAgent(s.AgentPort, AgentOpts{})
	b.WaitReady()
	s.WaitBackends(2)
	url := t.HTTP(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.URL.Path) })
	var wg sync.WaitGroup
	for n := range 100 {
		wg.Go(func() {
			tunnel, err := s.Tunnel(t.Ctx)
			if err != nil {
				t.Errorf("create tunnel: %v", err)
				return
			}
			defer tunnel.cancel()
			want := fmt.Sprintf("/%d", n)
			if body, err := get(tunnel.httpClient(), url+want[1:]); err != nil || body != want {
				t.Errorf("request %d: %q, %v", n, body, err)
			}
		})
	}
	wg.Wait()
	if a.Metric("dial_duration_seconds_count") == 0 || b.Metric("dial_duration_seconds_count") == 0 {
		t.Errorf("one of the agents was not used")
	}
	t.clean(s, a)
	t.clean(s, b)
}

func rowConcurrentDownloads(t *T) {
	for _, mode := range []string{modeGRPC, modeConnect} {
		s, a := t.StartPair(ServerOpts{UDS: true, Mode: mode}, AgentOpts{})
		url := t.HTTP(sized(1<<20, 10))
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				c := s.httpVia()
				body, err := get(c, url)
				if err != nil || len(body) != 10<<20 {
					t.Errorf("%s: %d bytes, %v", mode, len(body), err)
				}
				c.CloseIdleConnections()
			})
		}
		wg.Wait()
		t.clean(s, a)
		a.Kill()
		s.Kill()
	}
}

func rowSecondStream(t *T) {
	for _, mode := range []string{modeGRPC, modeConnect} {
		s, a := t.StartPair(ServerOpts{UDS: true, Mode: mode}, AgentOpts{ID: "same"})
		answer := make(chan struct{})
		got := make(chan struct{}, 10)
		url := t.HTTP(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				got <- struct{}{}
				<-answer
			}
			io.WriteString(w, "hello")
		})
		c := s.httpVia()
		result := make(chan error, 1)
		go func() {
			body, err := get(c, url+"slow")
			if err == nil && body != "hello" {
				err = fmt.Errorf("body %q", body)
			}
			result <- err
		}()
		<-got
		b := t.StartAgent(s.AgentPort, AgentOpts{ID: "same"})
		b.WaitReady()
		s.WantMetric(2, "grpc_connections", "service_method", "Connect")
		s.WaitBackends(1)
		close(answer)
		select {
		case err := <-result:
			if err != nil {
				t.Errorf("%s: the request in flight: %v", mode, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: the request in flight is not answered", mode)
		}
		t.wantHello(c, url) // the same connection
		b.Kill()
		s.WantMetric(1, "grpc_connections", "service_method", "Connect")
		s.WaitBackends(1)
		t.wantHello(c, url)
		t.clean(s, a)
		a.Kill()
		s.Kill()
	}
}

func rowCustomALPN(t *T) {
	offered := make(chan []string, 10)
	cfg := &tls.Config{
		Certificates: []tls.Certificate{t.env.Certs.Cluster.TLS},
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			offered <- h.SupportedProtos
			return nil, nil
		},
		NextProtos: []string{"h2"},
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	t.Check(err, "listen")
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	t.StartAgent(ln.Addr().(*net.TCPAddr).Port, AgentOpts{Args: []string{"--alpn-proto=one", "--alpn-proto=two"}})
	select {
	case got := <-offered:
		for _, want := range []string{"one", "two", "h2"} {
			if !slices.Contains(got, want) {
				t.Errorf("offered %q", got)
			}
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("no TLS connection")
	}
}

func rowHighlyAvailable(t *T) {
	start := func(id string) *Server {
		return t.StartServer(ServerOpts{UDS: true, ID: id, Args: []string{"--server-count=3"}})
	}
	servers := []*Server{start("s0"), start("s1"), start("s2")}
	var mu sync.Mutex
	backends := []string{servers[0].agentAddr(), servers[1].agentAddr(), servers[2].agentAddr()}
	var turn atomic.Int64
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	t.Check(err, "listen")
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			// Now and then the same server twice, as a real balancer would.
			addr := backends[int(turn.Add(1)*2/3)%len(backends)]
			mu.Unlock()
			out, err := net.Dial("tcp", addr)
			if err != nil {
				in.Close()
				continue
			}
			go func() { io.Copy(out, in); out.Close() }()
			go func() { io.Copy(in, out); in.Close() }()
		}
	}()
	a := t.StartAgent(ln.Addr().(*net.TCPAddr).Port, AgentOpts{})
	want := func(n float64) {
		t.Eventually(20*time.Second, func() error {
			if got := a.Metric("open_server_connections"); got != n {
				return fmt.Errorf("%v server connections, want %v", got, n)
			}
			return nil
		})
	}
	want(3)
	url := t.HTTP(hello)
	check := func(servers ...*Server) {
		for _, s := range servers {
			s.WaitBackends(1)
			t.wantHello(s.MustTunnel().httpClient(), url)
		}
	}
	check(servers...)
	mu.Lock()
	backends = backends[1:]
	mu.Unlock()
	servers[0].Kill()
	want(2)
	check(servers[1:]...)
	s3 := start("s3")
	mu.Lock()
	backends = append(backends, s3.agentAddr())
	mu.Unlock()
	want(3)
	check(servers[1], servers[2], s3)
}

func rowReadiness(t *T)        { t.readiness(modeGRPC) }
func rowReadinessConnect(t *T) { t.readiness(modeConnect) }

func (t *T) readiness(mode string) {
	s := t.StartServer(ServerOpts{UDS: true, Mode: mode})
	code, body, err := httpGet(s.health("/readyz"))
	if err != nil || code != 500 || body != "no connection to any proxy agent" {
		t.Errorf("without an agent /readyz answers %d %q (%v)", code, body, err)
	}
	a := t.StartAgent(s.AgentPort, AgentOpts{})
	a.WaitReady()
	t.WaitStatus(s.health("/readyz"), 200)
	a.Kill()
	t.WaitStatus(s.health("/readyz"), 500)
}

func rowAgentWithoutServer(t *T) {
	a := t.StartAgent(freePort(), AgentOpts{})
	for range 5 {
		code, body, err := httpGet(a.health("/healthz"))
		if err != nil || code != 200 || body != "ok" {
			t.Errorf("/healthz answers %d %q (%v)", code, body, err)
		}
		if code, _, err := httpGet(a.health("/readyz")); err != nil || code != 503 {
			t.Errorf("/readyz answers %d (%v)", code, err)
		}
		t.Sleep(300 * time.Millisecond)
	}
}

func rowServerRestart(t *T) {
	s, a := t.StartPair(ServerOpts{UDS: true}, AgentOpts{})
	a.WantMetric(1, "open_server_connections")
	s.Kill()
	a.WantMetric(0, "open_server_connections")
	t.WaitStatus(a.health("/readyz"), 503)
	s2 := t.StartServer(ServerOpts{UDS: true, AgentPort: s.AgentPort})
	a.WantMetric(1, "open_server_connections")
	s2.WaitBackends(1)
	t.wantHello(s2.MustTunnel().httpClient(), t.HTTP(hello))
}

func rowPartialReads(t *T) {
	s, a := t.udsPair()
	g := t.Echo()
	tunnel := s.MustTunnel()
	conn, err := tunnel.DialContext(t.Ctx, "tcp", g.Addr)
	t.Check(err, "dial")
	exchange := func(msg string, want ...int) {
		n, err := conn.Write([]byte(msg))
		if err != nil || n != len(msg) {
			t.Fatalf("write: %d, %v", n, err)
		}
		rest := msg
		for i, size := range want {
			buf := make([]byte, 10)
			n, err := conn.Read(buf)
			if err != nil || n != size || string(buf[:n]) != rest[:n] {
				t.Fatalf("read %d of %q: %q, %v", i, msg, buf[:n], err)
			}
			rest = rest[n:]
		}
	}
	exchange("0123456789012345678901234", 10, 10, 5)
	exchange("0123456", 7)
	t.Check(conn.Close(), "close")
	s.WantDone(tunnel)
	a.WantMetric(0, "open_endpoint_connections")
	t.clean(s, a)
}

func rowCleanShutdown(t *T) {
	for _, mode := range []string{modeGRPC, modeConnect} {
		s, a := t.StartPair(ServerOpts{Mode: mode}, AgentOpts{})
		g := t.Echo()
		for range 20 {
			conn := s.MustDial(g.Addr)
			t.Check(echoOnce(conn, "ping"), "echo")
			conn.Close()
		}
		t.Eventually(12*time.Second, func() error {
			if n := a.Metric("open_endpoint_connections"); n != 0 {
				return fmt.Errorf("%v connections are open", n)
			}
			return nil
		})
		s.WantMetric(0, "pending_backend_dials")
		t.clean(s, a)
		a.Kill()
		s.Kill()
	}
}

// rowClientBasics keeps to what every client of ours, old or new, can do.
func rowClientBasics(t *T) {
	s := t.StartServer(ServerOpts{})
	wantError := func(address, text string) {
		ctx, cancel := context.WithTimeout(t.Ctx, 10*time.Second)
		defer cancel()
		if conn, err := s.Dial(ctx, address); err == nil {
			conn.Close()
			t.Errorf("dial of %s succeeds, want %q", address, text)
		} else if !strings.Contains(err.Error(), text) {
			t.Errorf("dial of %s: %v, want %q", address, err, text)
		}
	}
	echo := t.Echo()
	wantError(echo.Addr, "No agent available")
	a := t.StartAgent(s.AgentPort, AgentOpts{})
	a.WaitReady()
	t.WaitStatus(s.health("/readyz"), 200)
	wantError(t.closedPort(), "connection refused")
	idle := func(n float64) {
		a.WantMetric(n, "open_endpoint_connections")
		s.WantMetric(n, "established_connections")
	}
	conn := s.MustDial(echo.Addr)
	t.Check(echoOnce(conn, "hello"), "echo")
	idle(1)
	conn.Close()
	idle(0)
	// The target ends it.
	conn = s.MustDial(t.Target(func(c *net.TCPConn) {
		c.Read(make([]byte, 1)) // one that speaks first is not heard by all
		c.Write([]byte("bye"))
	}).Addr)
	conn.Write([]byte{1})
	got := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(conn)
		got <- b
	}()
	select {
	case b := <-got:
		if string(b) != "bye" {
			t.Errorf("read %q, want the target's last words", b)
		}
	case <-time.After(patience):
		t.Errorf("no EOF when the target has closed")
	}
	conn.Close()
	idle(0)
	// While the agent drains, what is open goes on.
	conn = s.MustDial(echo.Addr)
	a.Terminate()
	for range 5 {
		t.Check(echoOnce(conn, "still here"), "echo while the agent drains")
		t.Sleep(100 * time.Millisecond)
	}
	a.Kill()
	if err := readFullWithin(conn, make([]byte, 1), patience); err == nil || err.Error() == "timed out" {
		t.Errorf("the connection does not end with its agent (%v)", err)
	}
	s.WantMetric(0, "established_connections")
}
