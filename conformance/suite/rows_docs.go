package suite

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"crypto/tls"
)

func init() {
	register(Row{ID: "I28", Title: "the documentation's Go example asks a cluster for its version", Need: Must, Side: bothSides,
		Pairings: []Pairing{{Our, Our}, {Go, Go}}, Timeout: 180 * time.Second, Run: rowDocumentation})
}

// rowDocumentation runs cmd/docsnippet as a hub's program: the agent stands
// for the cluster that it is asked for, and reaches its API server.
func rowDocumentation(t *T) {
	c := t.env.Certs
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	t.Check(err, "listen")
	api := &http.Server{TLSConfig: &tls.Config{Certificates: []tls.Certificate{c.Cluster.TLS}}, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/version" || r.Header.Get("Authorization") != "Bearer of-a-user" {
			http.Error(w, "not what the example asks for", http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"major": "1", "minor": "99", "gitVersion": "v1.99.0-of-the-row"}`)
	})}
	go api.ServeTLS(ln, "", "")
	t.Cleanup(func() { api.Close() })

	kubeconfig := filepath.Join(t.dir, "kubeconfig")
	t.Check(os.WriteFile(kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: row
contexts: [{name: row, context: {cluster: row, user: row}}]
clusters: [{name: row, cluster: {server: "https://unused.invalid", certificate-authority: %q}}]
users: [{name: row, user: {token: of-a-user}}]
`, c.ClusterCA.File), 0o600), "kubeconfig")

	s := t.StartServer(ServerOpts{Strategies: "destHost"})
	a := t.StartAgent(s.AgentPort, AgentOpts{Identifiers: "host=localhost"})
	a.WaitReady()
	t.WaitStatus(s.health("/readyz"), 200)
	cmd := exec.CommandContext(t.Ctx, t.env.Docsnippet, "-proxy", fmt.Sprintf("127.0.0.1:%d", s.Front),
		"-ca", c.FrontendCA.File, "-cert", c.Client.CertFile, "-key", c.Client.KeyFile,
		"-kubeconfig", kubeconfig, "-cluster", "localhost:"+fmt.Sprint(ln.Addr().(*net.TCPAddr).Port))
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "v1.99.0-of-the-row") {
		t.Errorf("the example prints %q (%v)", oneLine(string(out), 300), err)
	}
	t.clean(s, a)
}
