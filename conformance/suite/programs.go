package suite

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Env is what all rows share.
type Env struct {
	OurServer, OurAgent []string // command lines
	GoServer, GoAgent   []string
	Client              string // an older release of the client as a program; "": the stock client of this module
	Konnbench           string
	Docsnippet          string
	Certs               *Certs
	Dir                 string
	Verbose             bool
}

const (
	modeGRPC    = "grpc"
	modeConnect = "http-connect"
)

// Server is a running proxy server.
type Server struct {
	*Proc
	t                                       *T
	Front, AgentPort, HealthPort, AdminPort int
	UDS                                     string
	Mode                                    string

	olderMu sync.Mutex
	older   string // address of an older client's program
}

// ServerOpts are the parts of a server's command line that rows vary.
type ServerOpts struct {
	Mode       string // default grpc
	UDS        bool
	Strategies string
	ID         string
	AgentPort  int // default: a fresh one
	// Linger is --half-close-linger of our server; "": its default, 10 s. The
	// original has no such thing.
	Linger string
	Args   []string
}

func (t *T) serverCommand() []string {
	if t.Pairing.Server == Our {
		return append([]string{}, t.env.OurServer...)
	}
	return append([]string{}, t.env.GoServer...)
}

func (t *T) agentCommand() []string {
	if t.Pairing.Agent == Our {
		return append([]string{}, t.env.OurAgent...)
	}
	return append([]string{}, t.env.GoAgent...)
}

// StartServer starts the server under test and waits until it is up.
func (t *T) StartServer(o ServerOpts) *Server {
	s := &Server{t: t, Mode: o.Mode, AgentPort: o.AgentPort, HealthPort: freePort(), AdminPort: freePort()}
	if s.Mode == "" {
		s.Mode = modeGRPC
	}
	if s.AgentPort == 0 {
		s.AgentPort = freePort()
	}
	c := t.env.Certs
	argv := append(t.serverCommand(),
		"--v=0", "--mode="+s.Mode,
		"--agent-bind-address=127.0.0.1", "--health-bind-address=127.0.0.1", "--admin-bind-address=127.0.0.1",
		fmt.Sprintf("--agent-port=%d", s.AgentPort), fmt.Sprintf("--health-port=%d", s.HealthPort), fmt.Sprintf("--admin-port=%d", s.AdminPort),
		"--cluster-cert="+c.Cluster.CertFile, "--cluster-key="+c.Cluster.KeyFile, "--cluster-ca-cert="+c.ClusterCA.File)
	if o.UDS {
		// A socket's path is limited to 108 bytes, a row's folder is not.
		dir, err := os.MkdirTemp("", "cpx")
		t.Check(err, "socket folder")
		t.Cleanup(func() { os.RemoveAll(dir) })
		s.UDS = filepath.Join(dir, "p.sock")
		argv = append(argv, "--server-port=0", "--uds-name="+s.UDS)
	} else {
		s.Front = freePort()
		argv = append(argv, fmt.Sprintf("--server-port=%d", s.Front), "--server-bind-address=127.0.0.1",
			"--server-cert="+c.Frontend.CertFile, "--server-key="+c.Frontend.KeyFile, "--server-ca-cert="+c.FrontendCA.File)
	}
	if o.Strategies != "" {
		argv = append(argv, "--proxy-strategies="+o.Strategies)
	}
	if o.ID != "" {
		argv = append(argv, "--server-id="+o.ID)
	}
	if o.Linger != "" && t.Pairing.Server == Our {
		argv = append(argv, "--half-close-linger="+o.Linger)
	}
	argv = append(argv, o.Args...)
	p, err := t.startProc(string(t.Pairing.Server)+"-server", argv, nil)
	t.Check(err, "start server")
	s.Proc = p
	t.Eventually(20*time.Second, func() error {
		if !p.Alive() {
			t.Fatalf("the server ended: %s", oneLine(p.logTail(), 500))
		}
		if s.UDS != "" {
			if _, err := os.Stat(s.UDS); err != nil {
				return err
			}
		}
		code, _, err := httpGet(s.health("/healthz"))
		if err == nil && code != 200 {
			err = fmt.Errorf("/healthz answers %d", code)
		}
		return err
	})
	return s
}

func (s *Server) health(path string) string {
	return fmt.Sprintf("http://127.0.0.1:%d%s", s.HealthPort, path)
}

func (s *Server) agentAddr() string { return fmt.Sprintf("127.0.0.1:%d", s.AgentPort) }

// Metric reads one sample of the server; name without the common prefix.
func (s *Server) Metric(name string, labels ...string) float64 {
	return readMetric(s.health("/metrics"), "server_"+name, labels)
}

// WantMetric awaits a value.
func (s *Server) WantMetric(want float64, name string, labels ...string) {
	s.t.wantMetric(s.health("/metrics"), want, "server_"+name, labels)
}

// WaitBackends awaits the number of agents the default strategy knows.
func (s *Server) WaitBackends(n int) {
	s.WantMetric(float64(n), "ready_backends", "proxy_strategy", "default")
}

// Agent is a running agent.
type Agent struct {
	*Proc
	t                     *T
	HealthPort, AdminPort int
}

// AgentOpts are the parts of an agent's command line that rows vary.
type AgentOpts struct {
	ID          string
	Identifiers string
	NoCert      bool
	Slow        bool // the default intervals, or those of Args
	Args        []string
	Env         []string
}

// StartAgent starts the agent under test towards a port; it does not wait for
// a connection.
func (t *T) StartAgent(port int, o AgentOpts) *Agent {
	a := &Agent{t: t, HealthPort: freePort(), AdminPort: freePort()}
	c := t.env.Certs
	argv := append(t.agentCommand(),
		"--v=0", "--proxy-server-host=127.0.0.1", fmt.Sprintf("--proxy-server-port=%d", port),
		"--ca-cert="+c.ClusterCA.File, "--agent-cert="+c.Agent.CertFile, "--agent-key="+c.Agent.KeyFile,
		"--health-server-host=127.0.0.1", fmt.Sprintf("--health-server-port=%d", a.HealthPort),
		fmt.Sprintf("--admin-server-port=%d", a.AdminPort))
	if !o.Slow {
		argv = append(argv, "--sync-interval=100ms", "--sync-interval-cap=500ms", "--probe-interval=100ms")
	}
	if o.ID != "" {
		argv = append(argv, "--agent-id="+o.ID)
	}
	if o.Identifiers != "" {
		argv = append(argv, "--agent-identifiers="+o.Identifiers)
	}
	argv = append(argv, o.Args...)
	p, err := t.startProc(string(t.Pairing.Agent)+"-agent", argv, o.Env)
	t.Check(err, "start agent")
	a.Proc = p
	t.Eventually(20*time.Second, func() error {
		if !p.Alive() {
			t.Fatalf("the agent ended: %s", oneLine(p.logTail(), 500))
		}
		_, _, err := httpGet(a.health("/healthz"))
		return err
	})
	return a
}

func (a *Agent) health(path string) string {
	return fmt.Sprintf("http://127.0.0.1:%d%s", a.HealthPort, path)
}

// Metric reads one sample of the agent.
func (a *Agent) Metric(name string, labels ...string) float64 {
	return readMetric(a.health("/metrics"), "agent_"+name, labels)
}

// WantMetric awaits a value.
func (a *Agent) WantMetric(want float64, name string, labels ...string) {
	a.t.wantMetric(a.health("/metrics"), want, "agent_"+name, labels)
}

// WaitReady awaits a connection to a server.
func (a *Agent) WaitReady() { a.t.WaitStatus(a.health("/readyz"), 200) }

// WaitStatus awaits an HTTP status code.
func (t *T) WaitStatus(url string, want int) {
	t.Eventually(15*time.Second, func() error {
		code, body, err := httpGet(url)
		if err == nil && code != want {
			err = fmt.Errorf("%s answers %d %q, want %d", url, code, body, want)
		}
		return err
	})
}

// StartPair starts a server and one agent and waits for them to be connected.
func (t *T) StartPair(so ServerOpts, ao AgentOpts) (*Server, *Agent) {
	s := t.StartServer(so)
	a := t.StartAgent(s.AgentPort, ao)
	a.WaitReady()
	t.WaitStatus(s.health("/readyz"), 200)
	return s, a
}

// Terminate sends SIGTERM.
func (p *Proc) Terminate() {
	p.Signal(syscall.SIGTERM)
}

var plainHTTP = &http.Client{
	Timeout:       5 * time.Second,
	Transport:     &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func httpGet(url string) (int, string, error) {
	code, _, body, err := httpGetHeader(url)
	return code, body, err
}

func httpGetHeader(url string) (int, http.Header, string, error) {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, "", err
	}
	rsp, err := plainHTTP.Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer rsp.Body.Close()
	body, err := io.ReadAll(rsp.Body)
	return rsp.StatusCode, rsp.Header, string(body), err
}

const metricPrefix = "konnectivity_network_proxy_"

// scrape returns all samples by name{labels}, the labels sorted as Prometheus
// writes them, and whether each family has a HELP line.
func scrape(url string) (map[string]float64, error) {
	code, body, err := httpGet(url)
	if err != nil {
		return nil, err
	}
	if code != 200 {
		return nil, fmt.Errorf("%s answers %d", url, code)
	}
	out := map[string]float64{}
	for line := range strings.SplitSeq(body, "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if i < 0 {
			continue
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("sample %q: %w", line, err)
		}
		out[sortLabels(line[:i])] = v
	}
	return out, nil
}

// sortLabels puts the labels of a sample in order, which is Go's way of
// writing them. (No value of ours has a comma in it.)
func sortLabels(sample string) string {
	name, labels, ok := strings.Cut(strings.TrimSuffix(sample, "}"), "{")
	if !ok {
		return sample
	}
	parts := strings.Split(labels, ",")
	slices.Sort(parts)
	return name + "{" + strings.Join(parts, ",") + "}"
}

// sampleName wants the labels in order.
func sampleName(name string, labels []string) string {
	full := metricPrefix + name
	if len(labels) == 0 {
		return full
	}
	var parts []string
	for i := 0; i < len(labels); i += 2 {
		parts = append(parts, fmt.Sprintf("%s=%q", labels[i], labels[i+1]))
	}
	return full + "{" + strings.Join(parts, ",") + "}"
}

// readMetric returns 0 for a sample that is not there, as a counter that has
// not counted need not be.
func readMetric(url, name string, labels []string) float64 {
	all, err := scrape(url)
	if err != nil {
		return -1
	}
	return all[sampleName(name, labels)]
}

func (t *T) wantMetric(url string, want float64, name string, labels []string) {
	t.Eventually(8*time.Second, func() error {
		all, err := scrape(url)
		if err != nil {
			return err
		}
		if got := all[sampleName(name, labels)]; got != want {
			return fmt.Errorf("%s is %v, want %v", sampleName(name, labels), got, want)
		}
		return nil
	})
}

// WantDialFailures awaits exactly these counts: reason to number; nil is none.
func (t *T) WantDialFailures(s *Server, a *Agent, server, agent map[string]float64) {
	check := func(url, name string, want map[string]float64) {
		prefix := metricPrefix + name + "{"
		t.Eventually(5*time.Second, func() error {
			all, err := scrape(url)
			if err != nil {
				return err
			}
			for k, v := range all {
				if reason, ok := strings.CutPrefix(k, prefix); ok {
					reason = strings.TrimSuffix(strings.TrimPrefix(reason, `reason="`), `"}`)
					if want[reason] != v {
						return fmt.Errorf("%s counts %v, want %v", k, v, want[reason])
					}
				}
			}
			for reason, v := range want {
				if all[sampleName(name, []string{"reason", reason})] != v {
					return fmt.Errorf("%s does not count %s %v times", name, reason, v)
				}
			}
			return nil
		})
	}
	if s != nil {
		check(s.health("/metrics"), "server_dial_failure_count", server)
	}
	if a != nil {
		check(a.health("/metrics"), "agent_endpoint_dial_failure_total", agent)
	}
}
