package suite

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
)

func init() {
	o := func(id string, side Side, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: Must, Side: side, Scripted: true, Run: run})
	}
	o("O01", ServerSide, "server: validation texts, exit status 1", rowServerValidation)
	o("O02", AgentSide, "agent: validation texts, exit status 1", rowAgentValidation)
	register(Row{ID: "O03", Title: "server: default ports and addresses", Need: Must, Side: ServerSide, Scripted: true, Alone: true, Run: rowServerDefaults})
	register(Row{ID: "O04", Title: "agent: default ports and addresses", Need: Must, Side: AgentSide, Scripted: true, Alone: true, Run: rowAgentDefaults})
	o("O05", ServerSide, "server: all flags in Go's spellings", rowServerFlags)
	o("O06", AgentSide, "agent: all flags in Go's spellings", rowAgentFlags)
	o("O07", ServerSide, "server: SIGTERM ends it with status 0", rowServerTerm)
	o("O08", ServerSide, "server: UDS file mode, stale file", rowServerUDSFile)
	o("O09", ServerSide, "server: default --backend-dial-timeout", rowDefaultDialTimeout)
	o("O10", ServerSide, "server: admin and health endpoints, HELP texts", rowServerEndpoints)
}

func rowServerValidation(t *T) {
	missing := filepath.Join(t.dir, "missing")
	for _, c := range []struct {
		text string
		args []string
	}{
		{"server ca cert must be set when in TCP mode (uds-name is empty)", []string{"--server-ca-cert="}},
		{"error checking server CA cert " + missing, []string{"--server-ca-cert=" + missing}},
		{"error checking server cert " + missing, []string{"--server-cert=" + missing}},
		{"error checking server key " + missing, []string{"--server-key=" + missing}},
		{"error checking cluster cert " + missing, []string{"--cluster-cert=" + missing}},
		{"error checking cluster key " + missing, []string{"--cluster-key=" + missing}},
		{"error checking cluster CA cert " + missing, []string{"--cluster-ca-cert=" + missing}},
		{"please do not try to use reserved port 1023 for the server port", []string{"--server-port=1023"}},
		{"please do not try to use reserved port 1023 for the agent port", []string{"--agent-port=1023"}},
		{"please do not try to use reserved port 1023 for the admin port", []string{"--admin-port", "1023"}},
		{"please do not try to use reserved port 0 for the health port", []string{"--health-port=0"}},
		{"please do not try to use ephemeral port 49152 for the server port", []string{"--server-port=49152"}},
		{"please do not try to use ephemeral port 49152 for the agent port", []string{"--agent-port=49152"}},
		{"please do not try to use ephemeral port 49152 for the admin port", []string{"--admin-port=49152"}},
		{"please do not try to use ephemeral port 65535 for the health port", []string{"--health-port=65535"}},
		{"mode must be set to either 'grpc' or 'http-connect' not \"nope\"", []string{"--mode=nope"}},
		{"server port should be set to 0 not 12345 for UDS", []string{"--uds-name=/tmp/x.sock", "--server-port=12345"}},
		{"server key should not be set for UDS", []string{"--uds-name=/tmp/x.sock", "--server-port=0"}},
		{"channel size 0 must be greater than 0", []string{"--xfr-channel-size=0"}},
		{"channel size -1 must be greater than 0", []string{"--xfr-channel-size=-1"}},
		{"graceful-shutdown-timeout must be >= 0, got -1s", []string{"--graceful-shutdown-timeout=-1s"}},
		{"backend-dial-timeout must be >= 0, got -1m30s", []string{"--backend-dial-timeout=-90s"}},
		{"cipher suite NOPE not supported, doesn't exist or considered as insecure", []string{"--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,NOPE"}},
		{"--enable-profiling must also be set", []string{"--enable-contention-profiling"}},
		{"--cluster-ca-cert can not be used when agent authentication is enabled", []string{"--agent-namespace=ns"}},
		{"--agent-service-account cannot be empty when agent authentication is enabled", []string{"--agent-namespace=ns", "--cluster-ca-cert="}},
		{"VersionTLS14", []string{"--tls-min-version=VersionTLS14"}},
		{"no-such-flag", []string{"--no-such-flag=1"}},
		{"server-port", []string{"--server-port=many"}},
		{"keepalive-time", []string{"--keepalive-time=soon"}},
		{"enable-profiling", []string{"--enable-profiling=perhaps"}},
	} {
		t.refusedServerArgs(c.text, c.args...)
	}
}

func (t *T) agentArgs() []string {
	c := t.env.Certs
	return append(t.agentCommand(), "--proxy-server-host=127.0.0.1", fmt.Sprintf("--proxy-server-port=%d", freePort()),
		"--ca-cert="+c.ClusterCA.File, "--agent-cert="+c.Agent.CertFile, "--agent-key="+c.Agent.KeyFile,
		"--health-server-host=127.0.0.1", fmt.Sprintf("--health-server-port=%d", freePort()), fmt.Sprintf("--admin-server-port=%d", freePort()))
}

func rowAgentValidation(t *T) {
	missing := filepath.Join(t.dir, "missing")
	for _, c := range []struct {
		text string
		args []string
	}{
		{"proxy server port 0 must be greater than 0", []string{"--proxy-server-port=0"}},
		{"health server port -5 must be greater than 0", []string{"--health-server-port=-5"}},
		{"admin server port 0 must be greater than 0", []string{"--admin-server-port=0"}},
		{"channel size 0 must be greater than 0", []string{"--xfr-channel-size=0"}},
		{"sync interval 2s must be less than sync interval cap 1s", []string{"--sync-interval=2s", "--sync-interval-cap=1s"}},
		{"--enable-profiling must also be set", []string{"--enable-contention-profiling"}},
		{"--server-count-source must be one of '', 'default', 'max', got both", []string{"--server-count-source=both"}},
		{"unknown address type: uid", []string{"--agent-identifiers=uid=x"}},
		{"agent address is invalid", []string{"--agent-identifiers=host=%zz"}},
		{"error checking agent CA cert " + missing, []string{"--ca-cert=" + missing}},
		{"error checking agent cert " + missing, []string{"--agent-cert=" + missing}},
		{"error checking agent key " + missing, []string{"--agent-key=" + missing}},
		{"error checking service account token path " + missing, []string{"--service-account-token-path=" + missing}},
		{"no-such-flag", []string{"--no-such-flag"}},
		{"sync-interval", []string{"--sync-interval=10"}},
	} {
		t.wantRefused("agent", t.agentArgs(), c.args, c.text)
	}
}

// listens tells whether something accepts connections there.
func listens(addr string) bool {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// otherAddress is an address of this machine that is not 127.0.0.1; the whole
// of 127/8 is loopback.
const otherAddress = "127.0.0.2"

func (t *T) defaults(name string, argv []string, public, private []string) {
	for _, port := range append(append([]string{}, public...), private...) {
		if listens("127.0.0.1:" + port) {
			t.Notef("port %s is in use here: not tried", port)
			return
		}
	}
	p, err := t.startProc(name, argv, nil)
	t.Check(err, "start")
	for _, port := range append(append([]string{}, public...), private...) {
		t.Eventually(15*time.Second, func() error {
			if !p.Alive() {
				t.Fatalf("ended: %s", oneLine(p.logTail(), 300))
			}
			if !listens("127.0.0.1:" + port) {
				return fmt.Errorf("nothing listens on port %s", port)
			}
			return nil
		})
	}
	for _, port := range public {
		if !listens(otherAddress + ":" + port) {
			t.Errorf("port %s is not open on all addresses", port)
		}
	}
	for _, port := range private {
		if listens(otherAddress + ":" + port) {
			t.Errorf("port %s is open beyond 127.0.0.1", port)
		}
	}
}

func rowServerDefaults(t *T) {
	c := t.env.Certs
	argv := append(t.serverCommand(), "--server-ca-cert="+c.FrontendCA.File, "--server-cert="+c.Frontend.CertFile, "--server-key="+c.Frontend.KeyFile,
		"--cluster-cert="+c.Cluster.CertFile, "--cluster-key="+c.Cluster.KeyFile, "--cluster-ca-cert="+c.ClusterCA.File)
	t.defaults("server", argv, []string{"8090", "8091", "8092"}, []string{"8095"})
}

func rowAgentDefaults(t *T) {
	c := t.env.Certs
	argv := append(t.agentCommand(), "--ca-cert="+c.ClusterCA.File, "--agent-cert="+c.Agent.CertFile, "--agent-key="+c.Agent.KeyFile)
	t.defaults("agent", argv, []string{"8093"}, []string{"8094"})
}

func rowServerFlags(t *T) {
	s := t.StartServer(ServerOpts{ID: "first", Args: []string{
		"--server-id", "last", "--server-count", "7", "--keepalive-time=1h30m", "--frontend-keepalive-time", "90s",
		"--enable-profiling", "--enable-contention-profiling=true", "--delete-existing-uds-file=T",
		"--authentication-audience=", "--kubeconfig-qps=1.5", "--kubeconfig-burst=3", "--kube-api-content-type=application/json",
		"--cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "--tls-min-version=VersionTLS12",
		"--xfr-channel-size=20", "--enable-lease-controller=false", "--lease-namespace=x", "--lease-label=a=b,c=d",
		"--graceful-shutdown-timeout=0s", "--backend-dial-timeout=1.5s", "--warn-on-channel-limit=false",
		"--v=1", "-v", "0", "--vmodule=x=2", "--logtostderr=true", "--alsologtostderr=false", "--stderrthreshold=2", "--log-file=", "--log-dir=",
		"--log-file-max-size=1800", "--add-dir-header=false", "--skip-headers", "--skip-log-headers=1", "--one-output=0", "--log-backtrace-at=",
	}})
	a := s.FakeAgent("a")
	if id, n := a.Header.Get("serverid"), a.Header.Get("servercount"); len(id) != 1 || id[0] != "last" || len(n) != 1 || n[0] != "7" {
		t.Errorf("serverid %q, servercount %q", id, n)
	}
	code, _, err := httpGet(fmt.Sprintf("http://127.0.0.1:%d/debug/pprof/", s.AdminPort))
	if err != nil || code != 200 {
		t.Errorf("/debug/pprof/ answers %d (%v)", code, err)
	}
}

func rowAgentFlags(t *T) {
	f := t.FakeServer("s")
	_, s := t.agentOf(f, AgentOpts{ID: "first", Identifiers: "host=first", Args: []string{
		"--agent-id", "last", "--agent-identifiers=host=h&host=i", "--enable-profiling=1", "--enable-contention-profiling",
		"--keepalive-time=2h45m", "--warn-on-channel-limit", "--xfr-channel-size=200", "--sync-forever=false",
		"--count-server-leases=false", "--lease-namespace=x", "--server-count-source=max", "--kube-api-content-type=application/json",
		"--admin-bind-address=127.0.0.1", "--service-account-token-path=", "--v=0", "-v=1", "--logtostderr", "--stderrthreshold=INFO", "--log-file-max-size=1800",
	}})
	if id := s.MD.Get("agentid"); len(id) != 1 || id[0] != "last" {
		t.Errorf("agentid %q", id)
	}
	if ids := s.MD.Get("agentidentifiers"); len(ids) != 1 || ids[0] != "host=h&host=i" {
		t.Errorf("agentidentifiers %q", ids)
	}
}

func rowServerTerm(t *T) {
	// Nothing is open: it ends at once.
	s := t.StartServer(ServerOpts{})
	s.Expect()
	begin := time.Now()
	s.Terminate()
	if !waitClosed(s.Done, 5*time.Second) {
		t.Fatalf("an idle server does not end")
	}
	if s.ExitCode() != 0 {
		t.Errorf("exit status %d", s.ExitCode())
	}
	t.Notef("an idle server ends after %v", time.Since(begin).Round(time.Millisecond))

	// A connection may go on for the grace.
	s = t.StartServer(ServerOpts{Args: []string{"--graceful-shutdown-timeout=3s"}})
	a := s.FakeAgent("a")
	c := s.Establish(a, 1, 1)
	s.Expect()
	begin = time.Now()
	s.Terminate()
	t.Sleep(time.Second)
	if c.TrySend(marshal(data(1, []byte("x")))) != nil {
		t.Fatalf("the client's stream has ended during the grace")
	}
	a.Want(data(1, []byte("x")))
	if listens(fmt.Sprintf("127.0.0.1:%d", s.Front)) {
		t.Errorf("new clients are accepted during shutdown")
	}
	if !waitClosed(s.Done, 6*time.Second) {
		t.Fatalf("not ended after the grace of 3 s")
	}
	if d := time.Since(begin); d < 2500*time.Millisecond || s.ExitCode() != 0 {
		t.Errorf("ended after %v with status %d", d, s.ExitCode())
	}
	c.WantAnyEnd()

	// The client ends: so does the server, before the grace is over.
	s = t.StartServer(ServerOpts{Args: []string{"--graceful-shutdown-timeout=20s"}})
	a = s.FakeAgent("a")
	c = s.Establish(a, 1, 1)
	s.Expect()
	begin = time.Now()
	s.Terminate()
	t.Sleep(500 * time.Millisecond)
	c.HalfClose()
	c.WantEnd(codes.OK, "")
	a.hangUp()
	if !waitClosed(s.Done, 5*time.Second) {
		t.ServerDiffers("waits on though all have gone")
	}
}

func rowServerUDSFile(t *T) {
	s := t.StartServer(ServerOpts{UDS: true})
	info, err := os.Stat(s.UDS)
	t.Check(err, "socket")
	if info.Mode().Perm() != 0o770 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
	s.Kill()
	if _, err := os.Stat(s.UDS); errors.Is(err, os.ErrNotExist) {
		t.Fatalf("SIGKILL has removed the socket?")
	}
	// The stale file is replaced.
	c := t.env.Certs
	argv := append(t.serverCommand(), "--v=0", "--server-port=0", "--uds-name="+s.UDS,
		"--agent-bind-address=127.0.0.1", "--health-bind-address=127.0.0.1",
		fmt.Sprintf("--agent-port=%d", freePort()), fmt.Sprintf("--health-port=%d", freePort()), fmt.Sprintf("--admin-port=%d", freePort()),
		"--cluster-cert="+c.Cluster.CertFile, "--cluster-key="+c.Cluster.KeyFile, "--cluster-ca-cert="+c.ClusterCA.File)
	p, err := t.startProc("server", argv, nil)
	t.Check(err, "start")
	t.Eventually(10*time.Second, func() error {
		conn, err := net.Dial("unix", s.UDS)
		if err == nil {
			conn.Close()
		}
		return err
	})
	p.Kill()
	p, err = t.startProc("server", append(argv, "--delete-existing-uds-file=false"), nil)
	t.Check(err, "start")
	p.Expect()
	if !waitClosed(p.Done, 10*time.Second) || p.ExitCode() != 1 {
		t.Errorf("with --delete-existing-uds-file=false and an existing file the server did not fail")
	}
}

func rowDefaultDialTimeout(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("mute")
	c := s.Client("client")
	begin := time.Now()
	c.Send(dialReq(8, "127.0.0.1:80"))
	a.WantDial()
	r, ok := c.next(30 * time.Second)
	switch {
	case !ok:
		t.ServerDiffers("no answer within 30 s")
	case r.pkt.GetDialResponse().GetError() != "timed out waiting for backend dial":
		t.Errorf("answered %s", show(r.pkt))
	default:
		if d := time.Since(begin); d < 27*time.Second || d > 29500*time.Millisecond {
			t.Errorf("answered after %v, want 28 s", d)
		}
	}
}

func rowServerEndpoints(t *T) {
	s := t.StartServer(ServerOpts{})
	a := s.FakeAgent("a")
	c := s.Establish(a, 1, 1)
	c.Send(data(1, []byte("x")))
	a.Want(data(1, []byte("x")))
	for _, port := range []int{s.HealthPort, s.AdminPort} {
		_, body, err := httpGet(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
		t.Check(err, "/metrics")
		for name, help := range serverHelp {
			t.wantHelp(body, "server_"+name, help)
		}
		t.wantHelp(body, "server_stream_packets_total", "")
	}
	if got := s.Metric("stream_packets_total", "packet_type", "DATA", "segment", "from_client"); got != 1 {
		t.Errorf("stream_packets_total of DATA from_client is %v", got)
	}
	if got := s.Metric("stream_packets_total", "packet_type", "DIAL_REQ", "segment", "to_agent"); got != 1 {
		t.Errorf("stream_packets_total of DIAL_REQ to_agent is %v", got)
	}
	if code, _, _ := httpGet(fmt.Sprintf("http://127.0.0.1:%d/debug/pprof/", s.AdminPort)); code != 404 {
		t.Errorf("/debug/pprof/ answers %d without --enable-profiling", code)
	}
	s.Signal(syscall.SIGURG) // must not matter
}

// wantHelp checks a HELP line; an empty text only asks for the family.
func (t *T) wantHelp(body, name, help string) {
	if !strings.Contains(body, "# HELP "+metricPrefix+name+" "+help) {
		t.Errorf("no HELP %s %s", name, help)
	}
}

var serverHelp = map[string]string{
	"dial_duration_seconds":           "Latency of dial to the remote endpoint in seconds",
	"frontend_write_duration_seconds": "Latency of write to the frontend in seconds",
	"grpc_connections":                "Number of current grpc connections, partitioned by service method.",
	"http_connections":                "Number of current HTTP CONNECT connections",
	"ready_backend_connections":       "Number of konnectivity agent connected to the proxy server. DEPRECATED, please use ready_backends",
	"ready_backends":                  "Number of konnectivity agent connected to the proxy server",
	"pending_backend_dials":           "Current number of pending backend dial requests",
	"established_connections":         "Current number of established end-to-end connections (post-dial).",
}
