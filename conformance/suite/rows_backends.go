package suite

import (
	"crypto/tls"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	b := func(id string, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: Must, Side: ServerSide, Scripted: true, Run: run})
	}
	b("B01", "response headers at once", rowBackendHeaders)
	b("B02", "agent ID: exactly one", rowAgentIDCount)
	b("B03", "identifiers: at most one set, decodable", rowIdentifierSets)
	b("B04", "identifiers are parsed as by Go", rowIdentifierParsing)
	b("B05", "default strategy: all agents are used", rowDefaultStrategy)
	b("B06", "defaultRoute strategy", rowDefaultRoute)
	b("B07", "destHost strategy", rowDestHost)
	b("B08", "destHost,default: unknown hosts go to any agent", rowDestHostDefault)
	b("B09", "shared identifiers", rowSharedIdentifiers)
	b("B10", "draining agents", rowDraining)
	b("B11", "same agent ID twice", rowSameAgentID)
	b("B12", "ready_backends for each configured strategy", rowReadyBackends)
	b("B14", "agents need a certificate of the cluster CA", rowAgentCertificates)
	b("B15", "/readyz looks at the first strategy", rowReadyz)
	b("B16", "strategies option", rowStrategiesOption)
}

func rowBackendHeaders(t *T) {
	s := t.StartServer(ServerOpts{ID: "my-server", Args: []string{"--server-count=3"}})
	begin := time.Now()
	a := s.FakeAgent("a")
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("headers came after %v", d)
	}
	if id, n := a.Header.Get("serverid"), a.Header.Get("servercount"); len(id) != 1 || id[0] != "my-server" || len(n) != 1 || n[0] != "3" {
		t.Errorf("serverid %q, servercount %q", id, n)
	}
	if ct := a.Header.Get("content-type"); len(ct) != 1 || ct[0] != "application/grpc" {
		t.Errorf("content-type %q", ct)
	}
	a.Silence(200 * time.Millisecond)
	s.WantMetric(1, "grpc_connections", "service_method", "Connect")
	a.HalfClose()
	a.WantEnd(codes.OK, "")
	s.WaitBackends(0)
}

// refusedAgent opens a Connect stream that must fail.
func (s *Server) refusedAgent(message string, md metadata.MD) {
	st, _ := s.agentStream(fmt.Sprint(md), md)
	go st.readLoop()
	st.WantEnd(codes.Unknown, message)
	s.WaitBackends(0)
}

func rowAgentIDCount(t *T) {
	s := t.StartServer(ServerOpts{})
	s.refusedAgent("expected one agent ID in the context, got []", nil)
	s.refusedAgent("expected one agent ID in the context, got [a b]", metadata.Pairs("agentid", "a", "agentid", "b"))
}

func rowIdentifierSets(t *T) {
	s := t.StartServer(ServerOpts{})
	s.refusedAgent("expected at most one set of agent identifiers in the context, got [host=a host=b]",
		metadata.Pairs("agentid", "a", "agentidentifiers", "host=a", "agentidentifiers", "host=b"))
	for _, bad := range []string{"host=%zz", "host=a;host=b", "%", "a=%1"} {
		s.refusedAgent("fail to parse url encoded string: ", metadata.Pairs("agentid", "a", "agentidentifiers", bad))
	}
	s.FakeAgent("a")
	s.WaitBackends(1)
}

// reaches dials an address and tells which agent, if any, is asked.
func (s *Server) reaches(address string, agents ...*FakeAgent) string {
	c := s.Client("probe")
	random := time.Now().UnixNano()
	c.Send(dialReq(random, address))
	defer func() {
		c.cancel()
		Within(s.t, c.ended, patience)
	}()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if r, ok := c.next(time.Millisecond); ok {
			if e := r.pkt.GetDialResponse().GetError(); e != "No agent available" {
				s.t.Errorf("dial of %s: answered %s", address, show(r.pkt))
			}
			return ""
		}
		for _, a := range agents {
			for {
				r, ok := a.next(time.Millisecond)
				if !ok {
					break
				}
				// DIAL_CLS and CLOSE_REQ of earlier probes are of no interest.
				if q := r.pkt.GetDialRequest(); r.pkt.GetType() == pb.PacketType_DIAL_REQ && q.GetRandom() == random {
					if q.GetAddress() != address {
						s.t.Errorf("address %q arrived as %q", address, q.GetAddress())
					}
					a.Send(dialErr(random, "no"))
					c.Want(dialErr(random, "no"))
					return strings.TrimPrefix(a.name, "agent ")
				}
			}
		}
	}
	s.t.Fatalf("dial of %s: neither answered nor forwarded", address)
	return ""
}

func (s *Server) wantReach(address, want string, agents ...*FakeAgent) {
	if got := s.reaches(address, agents...); got != want {
		s.t.Errorf("%s reaches agent %q, want %q", address, got, want)
	}
}

// spread counts which agents n dials reach.
func (s *Server) spread(n int, address string, agents ...*FakeAgent) map[string]int {
	out := map[string]int{}
	for range n {
		out[s.reaches(address, agents...)]++
	}
	return out
}

func rowIdentifierParsing(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost,defaultRoute"})
	a := s.FakeAgent("a", "ipv4=1.2.3.4&ipv4=1.2.3.5&ipv6=2001%3Adb8%3A%3A1&host=h.example&host=%68two&cidr=10.0.0.0/8&uid=zz&foo=bar&default-route=invalid")
	for _, addr := range []string{"1.2.3.4:80", "1.2.3.5:443", "[2001:db8::1]:80", "2001:db8::1", "h.example:1", "htwo", "h.example"} {
		s.wantReach(addr, "a", a)
	}
	for _, addr := range []string{"10.0.0.1:80", "zz:1", "bar:1", "a:1", "H.example:1", "1.2.3.6:80"} {
		s.wantReach(addr, "", a)
	}
	b := s.FakeAgent("b", "default-route=true&default-route=false")
	s.wantReach("10.0.0.1:80", "b", a, b)
	b.cancel()
	b.WantAnyEnd()
	t.Sleep(200 * time.Millisecond)
	s.wantReach("10.0.0.1:80", "", a)
	c := s.FakeAgent("c", "default-route=false&default-route=true&host=a+b")
	s.wantReach("10.0.0.1:80", "", a, c)
	s.wantReach("a b:80", "c", a, c)
	for i, yes := range []string{"1", "t", "T", "TRUE", "True"} {
		d := s.FakeAgent(fmt.Sprint("d", i), "default-route="+yes)
		s.wantReach("10.0.0.1:80", fmt.Sprint("d", i), a, c, d)
		d.cancel()
		d.WantAnyEnd()
		t.Sleep(150 * time.Millisecond)
	}
}

func rowDefaultStrategy(t *T) {
	s := t.StartServer(ServerOpts{})
	a, b := s.FakeAgent("a"), s.FakeAgent("b")
	s.WaitBackends(2)
	got := s.spread(40, "x:1", a, b)
	t.Notef("40 dials: %v", got)
	if got["a"] == 0 || got["b"] == 0 {
		t.Errorf("40 dials went to %v", got)
	}
	a.cancel()
	s.WaitBackends(1)
	if got := s.spread(10, "x:1", b); got["b"] != 10 {
		t.Errorf("10 dials went to %v", got)
	}
	b.hangUp()
	s.WaitBackends(0)
	s.wantReach("x:1", "")
}

func rowDefaultRoute(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "defaultRoute"})
	a, b := s.FakeAgent("a"), s.FakeAgent("b", "default-route=false")
	s.wantReach("x:1", "", a, b)
	c := s.FakeAgent("c", "default-route=true")
	if got := s.spread(10, "x:1", a, b, c); got["c"] != 10 {
		t.Errorf("10 dials went to %v", got)
	}
	c.cancel()
	s.WantMetric(0, "ready_backends", "proxy_strategy", "defaultRoute")
	s.wantReach("x:1", "", a, b)
}

func rowDestHost(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost"})
	a := s.FakeAgent("a", "host=localhost&host=node1.mydomain.com&ipv4=1.2.3.4&ipv6=9878::7675:1292:9183:7562")
	b := s.FakeAgent("b", "host=node2.mydomain.com")
	for _, addr := range []string{"localhost", "localhost:1000", "node1.mydomain.com", "node1.mydomain.com:443", "1.2.3.4", "1.2.3.4:80",
		"9878::7675:1292:9183:7562", "[9878::7675:1292:9183:7562]:80"} {
		s.wantReach(addr, "a", a, b)
	}
	s.wantReach("node2.mydomain.com:443", "b", a, b)
	for _, addr := range []string{"localhost2", "node1:443", "Node1.mydomain.com:443", "node1.mydomain.com.:443", "1.2.3.5:80", "mydomain.com:443", "[9878::7675:1292:9183:7563]:80", "x:1"} {
		s.wantReach(addr, "", a, b)
	}
	s.WantMetric(5, "ready_backends", "proxy_strategy", "destHost")
}

func rowDestHostDefault(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost,default"})
	a, b := s.FakeAgent("a", "host=h"), s.FakeAgent("b")
	if got := s.spread(10, "h:1", a, b); got["a"] != 10 {
		t.Errorf("the known host: 10 dials went to %v", got)
	}
	if got := s.spread(40, "unknown:1", a, b); got["a"] == 0 || got["b"] == 0 {
		t.Errorf("an unknown host: 40 dials went to %v", got)
	}
}

func rowSharedIdentifiers(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost"})
	a := s.FakeAgent("a", "host=h&host=ha")
	b := s.FakeAgent("b", "host=h&host=hb")
	c := s.FakeAgent("c", "host=h&host=hc")
	s.wantReach("hb:1", "b", a, b, c)
	got := s.spread(60, "h:1", a, b, c)
	t.Notef("60 dials: %v", got)
	if got[""] > 0 {
		t.Errorf("60 dials went to %v", got)
	}
	if got["a"] < 5 || got["b"] < 5 || got["c"] < 5 {
		t.ServerDiffers("not balanced: 60 dials went to %v", got)
	}
	a.cancel()
	s.WantMetric(3, "ready_backends", "proxy_strategy", "destHost")
	if got := s.spread(20, "h:1", b, c); got["b"]+got["c"] != 20 {
		t.Errorf("after a removal 20 dials went to %v", got)
	}
	c.hangUp()
	s.WantMetric(2, "ready_backends", "proxy_strategy", "destHost")
	if got := s.spread(10, "h:1", b); got["b"] != 10 {
		t.Errorf("after two removals 10 dials went to %v", got)
	}
	s.wantReach("ha:1", "", b)
	b.cancel()
	s.WantMetric(0, "ready_backends", "proxy_strategy", "destHost")
	s.wantReach("h:1", "")
}

func rowDraining(t *T) {
	for _, strategy := range []string{"default", "destHost", "defaultRoute"} {
		s := t.StartServer(ServerOpts{Strategies: strategy})
		a, b := s.FakeAgent("a", "host=h&default-route=true"), s.FakeAgent("b", "host=h&default-route=true")
		c := s.Client("client")
		c.Send(dialReq(1, "h:1"))
		// Whoever got it, that one drains.
		drained, other := a, b
		if r, ok := a.next(500 * time.Millisecond); !ok {
			drained, other = b, a
			b.WantDial()
		} else if r.pkt.GetType() != pb.PacketType_DIAL_REQ {
			t.Fatalf("received %s", show(r.pkt))
		}
		drained.Send(dialRsp(1, 1))
		c.Want(dialRsp(1, 1))
		drained.Send(drain())
		t.Sleep(200 * time.Millisecond)
		name := strings.TrimPrefix(other.name, "agent ")
		if got := s.spread(15, "h:1", a, b); got[name] != 15 {
			t.Errorf("%s: one drains, 15 dials went to %v, want %s", strategy, got, name)
		}
		other.Send(drain())
		t.Sleep(200 * time.Millisecond)
		if got := s.spread(10, "h:1", a, b); got[""] > 0 {
			t.Errorf("%s: all drain, 10 dials went to %v", strategy, got)
		}
		c.Send(data(1, []byte("up")))
		for {
			p := drained.Next()
			if p.Type == pb.PacketType_DATA {
				break
			}
			if p.Type == pb.PacketType_CLOSE_REQ {
				t.Fatalf("%s: received %s for an existing connection", strategy, show(p))
			}
		}
		drained.Send(data(1, []byte("down")))
		c.Want(data(1, []byte("down")))
		if code, body, _ := httpGet(s.health("/readyz")); code != 200 {
			t.Errorf("%s: /readyz answers %d %q while all drain", strategy, code, body)
		}
		s.Kill()
	}
}

func rowSameAgentID(t *T) {
	s := t.StartServer(ServerOpts{})
	a1 := s.FakeAgent("same")
	a2 := s.FakeAgent("same")
	a3 := s.FakeAgent("same")
	a1.name, a2.name, a3.name = "agent 1", "agent 2", "agent 3"
	s.WaitBackends(1)
	s.WantMetric(1, "ready_backend_connections")
	if got := s.spread(10, "x:1", a1, a2, a3); got["1"] != 10 {
		t.Errorf("10 dials went to %v, want the oldest stream", got)
	}
	a1.Send(drain())
	t.Sleep(200 * time.Millisecond)
	if got := s.spread(10, "x:1", a1, a2, a3); got["2"] != 10 {
		if got["1"] != 10 {
			t.Errorf("the oldest drains: 10 dials went to %v", got)
		}
		t.ServerDiffers("the oldest stream is used though it drains: %v", got)
	}
	a2.Send(drain())
	a3.Send(drain())
	t.Sleep(200 * time.Millisecond)
	if got := s.spread(10, "x:1", a1, a2, a3); got["1"] != 10 {
		t.Errorf("all drain: 10 dials went to %v, want the oldest stream", got)
	}
	a1.cancel()
	a1.WantAnyEnd()
	t.Sleep(200 * time.Millisecond)
	s.WaitBackends(1)
	if got := s.spread(10, "x:1", a2, a3); got["2"] != 10 {
		t.Errorf("after the oldest has gone 10 dials went to %v", got)
	}
	a2.hangUp()
	t.Sleep(200 * time.Millisecond)
	s.WaitBackends(1)
	if got := s.spread(10, "x:1", a3); got["3"] != 10 {
		t.Errorf("after two have gone 10 dials went to %v", got)
	}
	a3.hangUp()
	s.WaitBackends(0)
	// The later of two goes: the older one goes on.
	b1, b2 := s.FakeAgent("other"), s.FakeAgent("other")
	c := s.Establish(b1, 5, 1)
	b2.cancel()
	t.Sleep(200 * time.Millisecond)
	c.Send(data(1, []byte("x")))
	b1.Want(data(1, []byte("x")))
	s.WaitBackends(1)
}

func rowReadyBackends(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost,defaultRoute,default"})
	check := func(host, route, def float64) {
		all, err := scrape(s.health("/metrics"))
		t.Check(err, "metrics")
		for strategy, want := range map[string]float64{"destHost": host, "defaultRoute": route, "default": def} {
			name := sampleName("server_ready_backends", []string{"proxy_strategy", strategy})
			if got, ok := all[name]; !ok || got != want {
				t.Errorf("%s is %v (there: %v), want %v", name, got, ok, want)
			}
		}
	}
	check(0, 0, 0)
	s.FakeAgent("a", "host=h1&host=h2&ipv4=1.2.3.4")
	check(3, 0, 1)
	b := s.FakeAgent("b", "default-route=true")
	check(3, 1, 2)
	s.FakeAgent("c", "host=h1")
	check(3, 1, 3)
	b.cancel()
	s.WaitBackends(2)
	check(3, 0, 2)
	only := t.StartServer(ServerOpts{})
	all, err := scrape(only.health("/metrics"))
	t.Check(err, "metrics")
	for k := range all {
		if strings.Contains(k, "ready_backends{") && !strings.Contains(k, `"default"`) {
			t.Errorf("a strategy that is not configured is reported: %s", k)
		}
	}
	only.WaitBackends(0)
}

func rowAgentCertificates(t *T) {
	s := t.StartServer(ServerOpts{})
	c := t.env.Certs
	t.wantTLSRefused(s.AgentPort, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}, "no certificate")
	t.wantTLSRefused(s.AgentPort, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.ForeignClient.TLS}}, "foreign certificate")
	t.wantTLSRefused(s.AgentPort, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.Client.TLS}}, "a client's certificate")
	t.wantTLSRefused(s.AgentPort, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.Agent.TLS}, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}, "TLS 1.1")
	s.WaitBackends(0)
	s.FakeAgent("a")
	s.WaitBackends(1)
}

func rowReadyz(t *T) {
	s := t.StartServer(ServerOpts{Strategies: "destHost,default"})
	notReady := func() {
		for _, path := range []string{"/readyz", "/ready"} {
			code, body, err := httpGet(s.health(path))
			if err != nil || code != 500 || body != "no connection to any proxy agent" {
				t.Errorf("%s answers %d %q (%v)", path, code, body, err)
			}
		}
	}
	notReady()
	a := s.FakeAgent("a")
	s.WaitBackends(1)
	notReady()
	b := s.FakeAgent("b", "host=h")
	for _, path := range []string{"/readyz", "/ready", "/healthz"} {
		code, body, err := httpGet(s.health(path))
		if err != nil || code != 200 || body != "ok" {
			t.Errorf("%s answers %d %q (%v)", path, code, body, err)
		}
	}
	b.cancel()
	s.WantMetric(0, "ready_backends", "proxy_strategy", "destHost")
	notReady()
	a.cancel()
}

func rowStrategiesOption(t *T) {
	for _, ok := range []string{"destHost,default", ",default", "default,,", "default,defaultRoute,destHost"} {
		s := t.StartServer(ServerOpts{Args: []string{"--proxy-strategies=" + ok}})
		s.Kill()
	}
	t.refusedServer("--proxy-strategies=", "ProxyStrategies cannot be empty")
	t.refusedServer("--proxy-strategies=invalid", "invalid proxy strategies: unknown proxy strategy: invalid")
	t.refusedServer("--proxy-strategies=default,Default", "invalid proxy strategies: unknown proxy strategy: Default")
	t.refusedServer("--proxy-strategies=,", "invalid proxy strategies: ")
}

// refusedServer starts a server that must end at once with status 1 and a
// text.
func (t *T) refusedServer(arg, text string) {
	t.refusedServerArgs(text, arg)
}

func (t *T) refusedServerArgs(text string, args ...string) {
	c := t.env.Certs
	argv := append(t.serverCommand(),
		"--agent-bind-address=127.0.0.1", "--health-bind-address=127.0.0.1", "--server-bind-address=127.0.0.1",
		fmt.Sprintf("--agent-port=%d", freePort()), fmt.Sprintf("--health-port=%d", freePort()), fmt.Sprintf("--admin-port=%d", freePort()), fmt.Sprintf("--server-port=%d", freePort()),
		"--cluster-cert="+c.Cluster.CertFile, "--cluster-key="+c.Cluster.KeyFile, "--cluster-ca-cert="+c.ClusterCA.File,
		"--server-cert="+c.Frontend.CertFile, "--server-key="+c.Frontend.KeyFile, "--server-ca-cert="+c.FrontendCA.File)
	t.wantRefused("server", argv, args, text)
}

func (t *T) wantRefused(name string, argv, args []string, text string) {
	p, err := t.startProc(name, append(argv, args...), nil)
	t.Check(err, "start")
	p.Expect()
	if !waitClosed(p.Done, 15*time.Second) {
		t.Errorf("%q: accepted, want %q", args, text)
		p.Kill()
		return
	}
	if p.ExitCode() != 1 {
		t.Errorf("%q: exit status %d, want 1: %s", args, p.ExitCode(), oneLine(p.Log(), 200))
	}
	if log := p.Log(); !strings.Contains(log, text) {
		t.Errorf("%q: want %q, said: %s", args, text, oneLine(log, 300))
	}
}
