package suite

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// Impl names who made a program.
type Impl string

// The two implementations that are compared.
const (
	Our Impl = "our"
	Go  Impl = "go"
)

// Pairing is a server and an agent of given make; "our/go" is our server with
// the Go agent.
type Pairing struct{ Server, Agent Impl }

func (p Pairing) String() string { return string(p.Server) + "/" + string(p.Agent) }

// Pairings in the order of the table's columns.
var Pairings = []Pairing{{Our, Our}, {Our, Go}, {Go, Our}, {Go, Go}}

// Need says how much depends on a row.
type Need string

// A Differ row is one where the Go programs are broken and ours must not be.
const (
	Must   Need = "must"
	Should Need = "should"
	Differ Need = "differ"
)

// Side is the program a row is about.
type Side int

// Sides; both may be set.
const (
	ServerSide Side = 1 << iota
	AgentSide
)

func (s Side) String() string {
	switch s {
	case ServerSide:
		return "S"
	case AgentSide:
		return "A"
	case ServerSide | AgentSide:
		return "SA"
	}
	return "C"
}

// Row is one line of the matrix.
type Row struct {
	ID    string
	Title string
	Need  Need
	Side  Side
	// Scripted says that the other end is played by the test: one run for
	// each make of the program under test fills the cells of both its
	// pairings.
	Scripted bool
	// Pairings that the row is about; nil: all.
	Pairings []Pairing
	// Heavy rows need a core: they run two at once, after the light ones.
	Heavy bool
	// Alone keeps other rows from running at the same time, for what measures
	// time or needs both cores.
	Alone   bool
	Timeout time.Duration // default 60 s
	Run     func(*T)
}

// binds tells whether ours is to blame if the row fails in that pairing.
func (r *Row) binds(p Pairing) bool {
	return r.Side&ServerSide != 0 && p.Server == Our || r.Side&AgentSide != 0 && p.Agent == Our
}

var rows []*Row

func register(r Row) {
	if r.Timeout == 0 {
		r.Timeout = 60 * time.Second
	}
	rows = append(rows, &r)
}

// Rows are all registered rows, in the order of the tables.
func Rows() []*Row { return rows }

// T is one run of a row. Like testing.T it fails by Errorf (goes on) or
// Fatalf (stops; only in the row's own goroutine).
type T struct {
	Ctx     context.Context
	Row     *Row
	Pairing Pairing
	env     *Env
	dir     string

	mu       sync.Mutex
	errs     []string
	differs  []string
	notes    []string
	cleanups []func()
	procs    []*Proc
}

type failNow struct{}

// Errorf records a failure.
func (t *T) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.errs = append(t.errs, fmt.Sprintf(format, args...))
}

// Fatalf records a failure and ends the row.
func (t *T) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	panic(failNow{})
}

// Check ends the row if there is an error.
func (t *T) Check(err error, doing string, args ...any) {
	if err != nil {
		t.Fatalf("%s: %v", fmt.Sprintf(doing, args...), err)
	}
}

// Failed tells whether there has been a failure.
func (t *T) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.errs) > 0
}

// Notef records what was seen, for the report.
func (t *T) Notef(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

// Differf records behaviour that is known of the Go program and forbidden to
// ours.
func (t *T) Differf(who Impl, format string, args ...any) {
	if who == Our {
		t.Errorf(format, args...)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.differs = append(t.differs, fmt.Sprintf(format, args...))
}

// ServerDiffers is Differf about the server.
func (t *T) ServerDiffers(format string, args ...any) {
	t.Differf(t.Pairing.Server, format, args...)
}

// AgentDiffers is Differf about the agent.
func (t *T) AgentDiffers(format string, args ...any) { t.Differf(t.Pairing.Agent, format, args...) }

// Cleanup runs f when the row has ended, last one first.
func (t *T) Cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}

// Sleep waits, or less if the row's time is over.
func (t *T) Sleep(d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Ctx.Done():
	}
}

// Eventually polls until f returns nil, and fails the row if it does not in
// time.
func (t *T) Eventually(limit time.Duration, f func() error) {
	if err := t.poll(limit, f); err != nil {
		t.Fatalf("after %v: %v", limit, err)
	}
}

func (t *T) poll(limit time.Duration, f func() error) error {
	deadline := time.Now().Add(limit)
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || t.Ctx.Err() != nil {
			return err
		}
		t.Sleep(pause)
	}
}

// Within waits for a channel to be closed or to deliver, and tells whether it
// did.
func Within[V any](t *T, ch <-chan V, limit time.Duration) bool {
	select {
	case <-ch:
		return true
	case <-time.After(limit):
	case <-t.Ctx.Done():
	}
	return false
}

// Result is one cell of the matrix.
type Result struct {
	Status  string   `json:"status"` // pass, fail, timeout, differs
	Binds   bool     `json:"binds"`  // a failure is ours
	Seconds float64  `json:"seconds"`
	Errors  []string `json:"errors,omitempty"`
	Differs []string `json:"differs,omitempty"`
	Notes   []string `json:"notes,omitempty"`
}

func runRow(env *Env, row *Row, p Pairing, dir string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), row.Timeout)
	defer cancel()
	t := &T{Ctx: ctx, Row: row, Pairing: p, env: env, dir: dir}
	begin := time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(failNow); !ok {
					t.Errorf("panic: %v\n%s", r, debug.Stack())
				}
			}
		}()
		row.Run(t)
	}()
	timedOut := false
	select {
	case <-done:
	case <-ctx.Done():
		timedOut = true
	}
	cancel()
	t.mu.Lock()
	failed := timedOut || len(t.errs) > 0
	for _, p := range t.procs {
		if state, gone := p.unexpectedEnd(); gone {
			t.errs = append(t.errs, state)
			failed = true
		}
	}
	if failed {
		for _, p := range t.procs {
			if tail := p.logTail(); tail != "" && env.Verbose {
				t.notes = append(t.notes, p.Name+": "+tail)
			}
		}
	}
	t.mu.Unlock()
	// Ends the processes, so that a row which hangs on one of them ends too.
	for {
		t.mu.Lock()
		n := len(t.cleanups)
		if n == 0 {
			t.mu.Unlock()
			break
		}
		f := t.cleanups[n-1]
		t.cleanups = t.cleanups[:n-1]
		t.mu.Unlock()
		f()
	}
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Errorf("the row's goroutine did not end")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	res := Result{Binds: row.binds(p), Seconds: float64(time.Since(begin).Milliseconds()) / 1000, Errors: t.errs, Differs: t.differs, Notes: t.notes}
	subjectIsGo := !res.Binds
	switch {
	case timedOut && !(row.Need == Differ && subjectIsGo):
		res.Status = "timeout"
		res.Errors = append([]string{fmt.Sprintf("not finished after %v", row.Timeout)}, res.Errors...)
	case failed && row.Need == Differ && subjectIsGo:
		res.Status = "differs"
		res.Differs, res.Errors = append(res.Differs, res.Errors...), nil
	case failed:
		res.Status = "fail"
	case len(t.differs) > 0:
		res.Status = "differs"
	default:
		res.Status = "pass"
	}
	return res
}

func oneLine(s string, n int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
