// Command skew runs rows beside other versions: older releases of the Go
// server, agent and client (folder skew), and our own release before this one.
// Which rows, skew.json says; all of them decide.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"clusterproxy-conformance/suite"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "skew:", err)
		os.Exit(1)
	}
}

func run() error {
	with := flag.String("with", "", "comma list of words: only the pairs whose name has one of them (agent, server, client, ours, v0.34)")
	rows := flag.String("rows", "", "comma list of row IDs: only these of the listed ones")
	previous := flag.String("previous", "", "our release to compare with (default: the newest tag v* before HEAD)")
	workers := flag.Int("workers", 3, "rows at once")
	keep := flag.Bool("keep", false, "keep the working folder with the programs' logs")
	verbose := flag.Bool("v", false, "with failures, show the end of the programs' logs")
	flag.Parse()

	begin := time.Now()
	list, err := suite.ReadSkewRows()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "skew-")
	if err != nil {
		return err
	}
	if *keep {
		fmt.Fprintln(os.Stderr, "logs in", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	env, err := suite.NewEnv(dir)
	if err != nil {
		return err
	}
	env.Verbose = *verbose
	if env.OurServer, err = suite.OurCommand("", "proxy-server"); err != nil {
		return err
	}
	if env.OurAgent, err = suite.OurCommand("", "proxy-agent"); err != nil {
		return err
	}
	pairs, err := suite.SkewPairs(env, list)
	if err != nil {
		return err
	}
	ours, err := suite.PreviousPairs(env, list, *previous)
	switch {
	case errors.Is(err, suite.ErrNoRelease):
		fmt.Printf("SKIPPED: our own release before this one: %v (say which with -previous)\n", err)
	case err != nil:
		return err
	}
	pairs = suite.ChoosePairs(append(pairs, ours...), *with, *rows)
	if len(pairs) == 0 {
		return errors.New("no pair to run")
	}
	failed := suite.RunSkew(env, pairs, *workers, os.Stdout)
	fmt.Printf("%d pairs in %v, %d failed\n", len(pairs), time.Since(begin).Round(time.Second), len(failed))
	if len(failed) > 0 {
		return fmt.Errorf("failed:\n  %s", strings.Join(failed, "\n  "))
	}
	return nil
}
