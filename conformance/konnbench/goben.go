package main

import (
	"fmt"
	"math/rand"
	"sync/atomic"
	"time"
)

// goben moves bytes as github.com/udhos/goben does when no flags are given:
// on each connection both directions at once and independent of each other,
// random bytes, and rates that count from the first moment on. Like goben's,
// the written bytes are those that the connection has taken from the client,
// so --size and what lies in buffers at the end are part of the figure.
//
// The far end is a source, which discards what it reads while it writes; the
// first byte that is written starts it.
func goben(d *dialer, o *options) (map[string]any, error) {
	conns, err := openAll(d, o.parallel)
	if err != nil {
		return nil, err
	}
	var received, written atomic.Int64
	var stopping atomic.Bool
	var failed errorCounts
	loop := func(what string, buf []byte, call func([]byte) (int, error), count *atomic.Int64) {
		for !stopping.Load() {
			n, err := call(buf)
			count.Add(int64(n))
			if err != nil {
				if !stopping.Load() {
					failed.add(fmt.Errorf("%s: %w", what, err))
				}
				return
			}
		}
	}

	before, begin := sampleAll(o.watch), time.Now()
	for _, c := range conns {
		out := make([]byte, o.size)
		rand.Read(out)
		go loop("read", make([]byte, o.size), c.conn.Read, &received)
		go loop("write", out, c.conn.Write, &written)
	}
	total := func() int64 { return received.Load() + written.Load() }
	bySecond := ratesBySecond(total, o.duration)
	in, out, elapsed, after := received.Load(), written.Load(), time.Since(begin), sampleAll(o.watch)
	stopping.Store(true)
	ended := releaseAll(conns)

	rate := func(n int64) float64 { return round(float64(n)*8/1e6/elapsed.Seconds(), 1) }
	return map[string]any{
		"bytes":            in + out,
		"seconds":          round(elapsed.Seconds(), 3),
		"mbit_s":           rate(in + out),
		"mbit_s_read":      rate(in),
		"mbit_s_written":   rate(out),
		"mbit_s_by_second": bySecond,
		"procs":            procReport(before, after),
		"errors":           failed.m,
		"release":          ended,
	}, nil
}
