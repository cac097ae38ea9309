package suite

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Rows beside other versions: of the Go programs and client, and of our own.

// SkewPair is a column of the table of version skew.
type SkewPair struct {
	Name string
	Rows []string
	run  Pairing
	env  *Env
	// Ours on both sides: nothing may differ.
	strict bool
}

// SkewRows lists the rows of each kind of pair; it is skew.json.
type SkewRows struct {
	Agents   []string `json:"agents"`   // our server with an older agent
	Servers  []string `json:"servers"`  // an older server with our agent
	Clients  []string `json:"clients"`  // an older client with our server and agent
	Previous []string `json:"previous"` // our previous release with this one, both ways
}

// ReadSkewRows reads skew.json of this module.
func ReadSkewRows() (*SkewRows, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(root, "skew.json"))
	if err != nil {
		return nil, err
	}
	rows := &SkewRows{}
	if err := json.Unmarshal(text, rows); err != nil {
		return nil, fmt.Errorf("skew.json: %w", err)
	}
	for _, id := range slices.Concat(rows.Agents, rows.Servers, rows.Clients, rows.Previous) {
		if rowByID(id) == nil {
			return nil, fmt.Errorf("skew.json names %s, which does not exist", id)
		}
	}
	return rows, nil
}

func rowByID(id string) *Row {
	if i := slices.IndexFunc(rows, func(r *Row) bool { return r.ID == id }); i >= 0 {
		return rows[i]
	}
	return nil
}

// SkewPairs builds the older programs. The folder skew/ holds their pinned
// versions: a folder for each release of server and agent, and a .mod file for
// each of the client.
func SkewPairs(env *Env, rows *SkewRows) ([]*SkewPair, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	var pairs []*SkewPair
	folders, err := filepath.Glob(filepath.Join(root, "skew", "v*"))
	if err != nil {
		return nil, err
	}
	for _, dir := range folders {
		older, version := *env, filepath.Base(dir)
		for name, command := range map[string]*[]string{"server": &older.GoServer, "agent": &older.GoAgent} {
			program, err := buildCached(dir, "go.mod", name, tools[name])
			if err != nil {
				return nil, err
			}
			*command = []string{program}
		}
		pairs = append(pairs,
			&SkewPair{Name: "agent " + version, Rows: rows.Agents, run: Pairing{Our, Go}, env: &older},
			&SkewPair{Name: "server " + version, Rows: rows.Servers, run: Pairing{Go, Our}, env: &older})
	}
	clients := filepath.Join(root, "skew", "client")
	mods, err := filepath.Glob(filepath.Join(clients, "v*.mod"))
	if err != nil {
		return nil, err
	}
	for _, mod := range mods {
		older, version := *env, strings.TrimSuffix(filepath.Base(mod), ".mod")
		if older.Client, err = buildCached(clients, filepath.Base(mod), "client", ".", "main.go"); err != nil {
			return nil, err
		}
		pairs = append(pairs, &SkewPair{Name: "client " + version, Rows: rows.Clients, run: Pairing{Our, Our}, env: &older})
	}
	return pairs, nil
}

// ErrNoRelease says that there is nothing to compare with.
var ErrNoRelease = errors.New("no tag of a release is an ancestor of this commit")

// PreviousPairs are this tree with our release before it, both ways. Revision
// is a commit, or "" for the newest tag v* before HEAD.
//
// The release is taken from Git into the cache, with a virtual environment of
// the dependencies that it pinned.
func PreviousPairs(env *Env, rows *SkewRows, revision string) ([]*SkewPair, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	top := filepath.Dir(root)
	if revision == "" {
		// Not the tag of HEAD: a release is compared with the one before it.
		out, err := exec.Command("git", "-C", top, "describe", "--tags", "--abbrev=0", "--match=v[0-9]*", "HEAD^").Output()
		if err != nil {
			return nil, ErrNoRelease
		}
		revision = strings.TrimSpace(string(out))
	}
	python, err := previousRelease(top, revision)
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", revision, err)
	}
	older := *env
	older.GoServer = []string{python, "-m", "clusterproxy", "server"}
	older.GoAgent = []string{python, "-m", "clusterproxy", "agent"}
	return []*SkewPair{
		{Name: "agent ours " + revision, Rows: rows.Previous, run: Pairing{Our, Go}, env: &older, strict: true},
		{Name: "server ours " + revision, Rows: rows.Previous, run: Pairing{Go, Our}, env: &older, strict: true},
	}, nil
}

// previousRelease returns a Python that runs that revision.
func previousRelease(top, revision string) (string, error) {
	commit, err := exec.Command("git", "-C", top, "rev-parse", "--verify", revision+"^{commit}").Output()
	if err != nil {
		return "", err
	}
	cache, err := cacheRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "release-"+strings.TrimSpace(string(commit))[:16])
	python := filepath.Join(dir, "venv", "bin", "python")
	if _, err := os.Stat(filepath.Join(dir, "ready")); err == nil {
		return python, nil
	}
	fmt.Fprintf(os.Stderr, "installing release %s\n", revision)
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	archive := exec.Command("git", "-C", top, "archive", "--format=tar", revision, "src", "requirements")
	unpack := exec.Command("tar", "-x", "-C", dir)
	if unpack.Stdin, err = archive.StdoutPipe(); err != nil {
		return "", err
	}
	if err := archive.Start(); err != nil {
		return "", err
	}
	if out, err := unpack.CombinedOutput(); err != nil {
		return "", fmt.Errorf("tar: %w: %s", err, out)
	}
	if err := archive.Wait(); err != nil {
		return "", fmt.Errorf("git archive: %w", err)
	}
	for _, argv := range [][]string{
		{filepath.Join(top, ".venv", "bin", "python"), "-m", "venv", filepath.Join(dir, "venv")},
		{python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "-r", filepath.Join(dir, "requirements", "runtime.txt")},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, oneLine(string(out), 500))
		}
	}
	packages, err := filepath.Glob(filepath.Join(dir, "venv", "lib", "python*", "site-packages"))
	if err != nil || len(packages) != 1 {
		return "", fmt.Errorf("no site-packages in the virtual environment (%v)", err)
	}
	if err := os.WriteFile(filepath.Join(packages[0], "clusterproxy.pth"), []byte(filepath.Join(dir, "src")+"\n"), 0o644); err != nil {
		return "", err
	}
	return python, os.WriteFile(filepath.Join(dir, "ready"), nil, 0o644)
}

// RunSkew runs the pairs' rows, prints the table, and lists what has failed.
func RunSkew(env *Env, pairs []*SkewPair, workers int, w io.Writer) []string {
	type cell struct {
		pair *SkewPair
		row  *Row
	}
	var cells []cell
	var ids []string
	for _, p := range pairs {
		for _, id := range p.Rows {
			cells = append(cells, cell{p, rowByID(id)})
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	results := map[cell]Result{}
	var failed []string
	var mu sync.Mutex
	inParallel(cells, workers, func(c cell) {
		dir := filepath.Join(env.Dir, strings.ReplaceAll(c.pair.Name, " ", "-")+"-"+c.row.ID)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			panic(err)
		}
		res := runRow(c.pair.env, c.row, c.pair.run, dir)
		if res.Status == "differs" && c.pair.strict {
			res.Status = "fail"
		}
		mu.Lock()
		defer mu.Unlock()
		results[c] = res
		printCell(w, res, c.row, c.pair.Name)
		if res.Status != "pass" && res.Status != "differs" {
			why := slices.Concat(res.Errors, res.Differs)
			failed = append(failed, fmt.Sprintf("%s with %s: %s: %s", c.row.ID, c.pair.Name, res.Status, strings.Join(why[:min(len(why), 3)], "; ")))
		}
	})
	fmt.Fprintf(w, "\n%-5s", "row")
	for _, p := range pairs {
		fmt.Fprintf(w, " %-*s", max(len(p.Name), 8), p.Name)
	}
	fmt.Fprintln(w, " what")
	for _, id := range ids {
		row := rowByID(id)
		fmt.Fprintf(w, "%-5s", id)
		for _, p := range pairs {
			text := "-"
			if r, ok := results[cell{p, row}]; ok {
				text = r.Status
			}
			fmt.Fprintf(w, " %-*s", max(len(p.Name), 8), text)
		}
		fmt.Fprintln(w, " "+row.Title)
	}
	fmt.Fprintln(w, "\nAgents and servers of another version with our server or agent of this one; clients with both of ours.")
	return failed
}

// dialOlder dials with an older client, which is a program of its own.
func (s *Server) dialOlder(ctx context.Context, address string) (net.Conn, error) {
	relay, err := s.olderClient()
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", relay)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := io.WriteString(conn, address+"\n"); err != nil {
		conn.Close()
		return nil, err
	}
	var line []byte
	for one := make([]byte, 1); ; line = append(line, one[0]) {
		if _, err := conn.Read(one); err != nil {
			conn.Close()
			return nil, fmt.Errorf("the client's answer: %w", err)
		}
		if one[0] == '\n' {
			break
		}
	}
	if string(line) != "ok" {
		conn.Close()
		return nil, errors.New(string(line))
	}
	return conn, nil
}

// olderClient returns the address of the running program.
func (s *Server) olderClient() (string, error) {
	s.olderMu.Lock()
	defer s.olderMu.Unlock()
	if s.older != "" {
		return s.older, nil
	}
	argv := []string{s.t.env.Client}
	if s.UDS != "" {
		argv = append(argv, "-server", s.UDS)
	} else {
		c := s.t.env.Certs
		argv = append(argv, "-server", fmt.Sprintf("127.0.0.1:%d", s.Front), "-ca", c.FrontendCA.File, "-cert", c.Client.CertFile, "-key", c.Client.KeyFile)
	}
	p, err := s.t.startProc("client", argv, nil)
	if err != nil {
		return "", err
	}
	err = s.t.poll(5*time.Second, func() error {
		line, _, ok := bytes.Cut([]byte(p.Log()), []byte("\n"))
		if !ok {
			return errors.New("the client program is not up")
		}
		s.older = string(line)
		return nil
	})
	return s.older, err
}

// ChoosePairs leaves those whose name has one of the words, and of their rows
// those that are listed; empty lists choose all.
func ChoosePairs(pairs []*SkewPair, words, ids string) []*SkewPair {
	return slices.DeleteFunc(pairs, func(p *SkewPair) bool {
		if words != "" && !slices.ContainsFunc(strings.Split(words, ","), func(word string) bool { return strings.Contains(p.Name, word) }) {
			return true
		}
		if ids != "" {
			p.Rows = slices.DeleteFunc(slices.Clone(p.Rows), func(id string) bool { return !slices.Contains(strings.Split(ids, ","), id) })
		}
		return len(p.Rows) == 0
	})
}
