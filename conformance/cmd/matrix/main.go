// Command matrix runs the conformance rows against pairings of our and the Go
// programs, prints the table and fails if a row that decides has failed.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"clusterproxy-conformance/suite"
)

func main() {
	if err := run(); err != nil {
		if !errors.Is(err, errSaid) {
			fmt.Fprintln(os.Stderr, "matrix:", err)
		}
		os.Exit(1)
	}
}

// The run in a network of its own has said what is wrong.
var errSaid = errors.New("said already")

func run() error {
	rows := flag.String("rows", "", "comma list of row IDs or patterns (S*,H01); they decide, whether listed or not")
	gateFile := flag.String("gate", "", "JSON list of the rows that decide (default: rows.json of this module)")
	all := flag.Bool("all", false, "run every row, also those that do not decide")
	pairings := flag.String("pairings", "", "comma list of pairings SERVER/AGENT (default: our/our,our/go,go/our,go/go)")
	binding := flag.Bool("binding", false, "leave out what cannot fail for us: the Go programs' own results")
	workers := flag.Int("workers", 5, "rows at once, most of which wait; heavy ones run two at once")
	repeat := flag.Int("repeat", 1, "run each row so many times; the worst result counts")
	jsonFile := flag.String("json", "", "write the matrix to this file")
	ourServer := flag.String("our-server", os.Getenv("CONFORMANCE_OUR_SERVER"), "command line of our server (default: proxy-server of ../.venv/bin; env CONFORMANCE_OUR_SERVER)")
	ourAgent := flag.String("our-agent", os.Getenv("CONFORMANCE_OUR_AGENT"), "command line of our agent (default: proxy-agent of ../.venv/bin; env CONFORMANCE_OUR_AGENT)")
	keep := flag.Bool("keep", false, "keep the working folder with the programs' logs")
	verbose := flag.Bool("v", false, "with failures, show the end of the programs' logs")
	list := flag.Bool("list", false, "list the rows")
	h2spec := flag.String("h2spec", "", "run h2spec (strict) against this HOST:PORT instead of the rows")
	h2specNA := flag.String("h2spec-na", "", "JSON object: h2spec case to the reason why it cannot apply")
	h2specMin := flag.Int("h2spec-min", 110, "h2spec: fewer passed cases are a failure (110: what grpc-go passes)")
	interop := flag.String("interop", "", "run grpc-go's interop client against this HOST:PORT instead of the rows")
	flag.Parse()

	if *list {
		for _, r := range suite.Rows() {
			fmt.Printf("%-4s %-6s %-2s %s\n", r.ID, r.Need, r.Side, r.Title)
		}
		return nil
	}
	dir, err := os.MkdirTemp("", "conformance-")
	if err != nil {
		return err
	}
	if *keep {
		fmt.Fprintln(os.Stderr, "logs in", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	if *h2spec != "" {
		return suite.RunH2spec(*h2spec, dir, *h2specNA, *h2specMin, os.Stdout)
	}
	if *interop != "" {
		return suite.RunInterop(*interop, os.Stdout)
	}

	sel := suite.Selection{Workers: *workers, Repeat: *repeat, Binding: *binding, Pairings: suite.Pairings}
	if *pairings != "" {
		sel.Pairings = nil
		for name := range strings.SplitSeq(*pairings, ",") {
			i := slices.IndexFunc(suite.Pairings, func(p suite.Pairing) bool { return p.String() == strings.ToLower(name) })
			if i < 0 {
				return fmt.Errorf("unknown pairing %q", name)
			}
			sel.Pairings = append(sel.Pairings, suite.Pairings[i])
		}
	}
	gate, err := readGate(*gateFile)
	if err != nil {
		return err
	}
	decides := func(id string) bool { return slices.Contains(gate, id) }
	for _, id := range gate {
		if !slices.ContainsFunc(suite.Rows(), func(r *suite.Row) bool { return r.ID == id }) {
			return fmt.Errorf("the list of deciding rows names %s, which does not exist", id)
		}
	}
	switch {
	case *rows != "":
		patterns := strings.Split(*rows, ",")
		matches := func(id string) bool {
			return slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, id); return ok })
		}
		decides = matches
		for _, r := range suite.Rows() {
			if matches(r.ID) {
				sel.Rows = append(sel.Rows, r)
			}
		}
	case *all:
		sel.Rows = suite.Rows()
	default:
		for _, r := range suite.Rows() {
			if decides(r.ID) {
				sel.Rows = append(sel.Rows, r)
			}
		}
	}
	if len(sel.Rows) == 0 {
		return errors.New("no row to run")
	}

	env, err := suite.NewEnv(dir)
	if err != nil {
		return err
	}
	// All is built by now: there is nobody to ask for a module in a network of its own.
	if done, err := suite.RunInOwnNetwork(); done {
		if err != nil {
			return errSaid
		}
		return nil
	}
	if err := suite.EnterNetwork(dir); err != nil {
		return err
	}
	env.Verbose = *verbose
	if slices.ContainsFunc(sel.Pairings, func(p suite.Pairing) bool { return p.Server == suite.Our || p.Agent == suite.Our }) {
		if env.OurServer, err = suite.OurCommand(*ourServer, "proxy-server"); err != nil {
			return err
		}
		if env.OurAgent, err = suite.OurCommand(*ourAgent, "proxy-agent"); err != nil {
			return err
		}
	}

	begin := time.Now()
	m := suite.Run(env, sel, os.Stdout)
	m.Gate = gate
	m.Print(os.Stdout)
	if *jsonFile != "" {
		if err := m.WriteJSON(*jsonFile); err != nil {
			return err
		}
	}
	failures := m.Failures(decides)
	fmt.Printf("%d rows in %v, %d deciding cells failed\n", len(sel.Rows), time.Since(begin).Round(time.Second), len(failures))
	if len(failures) > 0 {
		return fmt.Errorf("failed:\n  %s", strings.Join(failures, "\n  "))
	}
	return nil
}

func readGate(file string) ([]string, error) {
	if file == "" {
		root, err := suite.ModuleRoot()
		if err != nil {
			return nil, err
		}
		file = filepath.Join(root, "rows.json")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var gate []string
	if err := json.Unmarshal(text, &gate); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return gate, nil
}
