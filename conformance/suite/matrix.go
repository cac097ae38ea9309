package suite

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Matrix is a whole run.
type Matrix struct {
	Rows  []*RowResult `json:"rows"`
	Gate  []string     `json:"gate"` // the rows that decide
	Ended time.Time    `json:"ended"`
}

// RowResult is one line.
type RowResult struct {
	ID       string            `json:"id"`
	Title    string            `json:"title"`
	Need     Need              `json:"need"`
	Side     string            `json:"side"`
	Scripted bool              `json:"scripted"`
	Cells    map[string]Result `json:"cells"` // by pairing
	row      *Row
}

// Selection says what to run.
type Selection struct {
	Rows     []*Row
	Pairings []Pairing
	Workers  int
	Repeat   int
	Binding  bool // leave out runs of which no cell binds ours
}

type job struct {
	row   *Row
	run   Pairing   // who plays
	cells []Pairing // where the result goes
}

// jobs lists the runs of a row. If the other end is scripted, both pairings of
// the program under test get the same result.
func (r *Row) jobs(wanted []Pairing) []job {
	if !r.Scripted {
		var out []job
		for _, p := range wanted {
			if r.Pairings == nil || slices.Contains(r.Pairings, p) {
				out = append(out, job{r, p, []Pairing{p}})
			}
		}
		return out
	}
	var out []job
	for _, impl := range []Impl{Our, Go} {
		j := job{row: r, run: Pairing{impl, impl}}
		for _, p := range wanted {
			if r.Side == AgentSide && p.Agent == impl || r.Side != AgentSide && p.Server == impl {
				j.cells = append(j.cells, p)
			}
		}
		if j.cells != nil {
			out = append(out, j)
		}
	}
	return out
}

// Run runs a selection and reports each cell as it is finished.
func Run(env *Env, sel Selection, progress io.Writer) *Matrix {
	m := &Matrix{}
	results := map[string]*RowResult{}
	var light, heavy, alone []job
	for _, r := range sel.Rows {
		res := &RowResult{ID: r.ID, Title: r.Title, Need: r.Need, Side: r.Side.String(), Scripted: r.Scripted, Cells: map[string]Result{}, row: r}
		m.Rows = append(m.Rows, res)
		results[r.ID] = res
		jobs := r.jobs(sel.Pairings)
		if sel.Binding {
			jobs = slices.DeleteFunc(jobs, func(j job) bool { return !slices.ContainsFunc(j.cells, r.binds) })
		}
		for range max(sel.Repeat, 1) {
			switch {
			case r.Alone:
				alone = append(alone, jobs...)
			case r.Heavy:
				heavy = append(heavy, jobs...)
			default:
				light = append(light, jobs...)
			}
		}
	}
	// Those that wait long begin first, so that nothing is left to wait for at
	// the end.
	slices.SortStableFunc(light, func(a, b job) int { return cmp.Compare(b.row.Timeout, a.row.Timeout) })
	var mu sync.Mutex
	n := 0
	do := func(j job) {
		mu.Lock()
		n++
		dir := filepath.Join(env.Dir, fmt.Sprintf("%03d-%s-%s", n, j.row.ID, strings.ReplaceAll(j.run.String(), "/", "-")))
		mu.Unlock()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			panic(err)
		}
		res := runRow(env, j.row, j.run, dir)
		mu.Lock()
		defer mu.Unlock()
		for _, p := range j.cells {
			cell := res
			cell.Binds = j.row.binds(p)
			old, again := results[j.row.ID].Cells[p.String()]
			if !again || old.Status == "pass" || cell.Status == "fail" {
				results[j.row.ID].Cells[p.String()] = cell
			}
		}
		who := j.run.String()
		if j.row.Scripted {
			who = string(j.run.Server) + " " + j.row.Side.String()
		}
		printCell(progress, res, j.row, who)
	}
	for _, phase := range []struct {
		jobs    []job
		workers int
	}{{light, sel.Workers}, {heavy, min(sel.Workers, 2)}, {alone, 1}} {
		inParallel(phase.jobs, phase.workers, do)
	}
	m.Ended = time.Now().UTC()
	return m
}

// printCell reports a run.
func printCell(w io.Writer, res Result, row *Row, who string) {
	fmt.Fprintf(w, "%-8s %-4s %-7s %6.2fs  %s\n", res.Status, row.ID, who, res.Seconds, row.Title)
	for _, kind := range []struct {
		mark  string
		lines []string
	}{{"!", res.Errors}, {"~", res.Differs}, {".", res.Notes}} {
		if n := len(kind.lines); n > 12 {
			kind.lines = append(kind.lines[:12:12], fmt.Sprintf("and %d more", n-12))
		}
		for _, line := range kind.lines {
			for l := range strings.SplitSeq(line, "\n") {
				fmt.Fprintf(w, "         %s %s\n", kind.mark, l)
			}
		}
	}
}

// inParallel calls do for each item, so many at once.
func inParallel[V any](items []V, workers int, do func(V)) {
	queue := make(chan V)
	var wg sync.WaitGroup
	for range max(workers, 1) {
		wg.Go(func() {
			for item := range queue {
				do(item)
			}
		})
	}
	for _, item := range items {
		queue <- item
	}
	close(queue)
	wg.Wait()
}

// Print writes the table.
func (m *Matrix) Print(w io.Writer) {
	fmt.Fprintf(w, "\n%-5s %-6s %-4s", "row", "need", "side")
	for _, p := range Pairings {
		fmt.Fprintf(w, " %-9s", p)
	}
	fmt.Fprintln(w, " what")
	gate := map[string]bool{}
	for _, id := range m.Gate {
		gate[id] = true
	}
	for _, r := range m.Rows {
		mark := " "
		if gate[r.ID] {
			mark = "*"
		}
		fmt.Fprintf(w, "%-4s%s %-6s %-4s", r.ID, mark, r.Need, r.Side)
		for _, p := range Pairings {
			text := "-"
			if c, ok := r.Cells[p.String()]; ok {
				text = c.Status
				if c.Binds && (text == "fail" || text == "timeout") {
					text = strings.ToUpper(text)
				}
				if !c.Binds {
					text = "(" + text + ")"
				}
			}
			fmt.Fprintf(w, " %-9s", text)
		}
		fmt.Fprintln(w, " "+r.Title)
	}
	fmt.Fprintln(w, "\n* row that decides; (…) cell that does not bind ours; differs: what Go is known to do wrong")
}

// Failures lists the cells that bind ours and did not pass, in rows for which
// decides is true.
func (m *Matrix) Failures(decides func(id string) bool) []string {
	var out []string
	for _, r := range m.Rows {
		if !decides(r.ID) {
			continue
		}
		for _, p := range Pairings {
			if c, ok := r.Cells[p.String()]; ok && c.Binds && c.Status != "pass" {
				// In a mixed pairing the Go end may differ; that is not ours.
				if c.Status == "differs" {
					continue
				}
				why := slices.Concat(c.Errors, c.Differs)
				out = append(out, fmt.Sprintf("%s %s: %s: %s", r.ID, p, c.Status, strings.Join(why[:min(len(why), 3)], "; ")))
			}
		}
	}
	return out
}

// WriteJSON writes the matrix to a file.
func (m *Matrix) WriteJSON(file string) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
