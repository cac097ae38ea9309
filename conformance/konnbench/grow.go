package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// grow opens more and more connections, and at each of --counts measures what
// is there: memory, the rate of further dials, and round trips on one of them.
func grow(d *dialer, o *options) (map[string]any, error) {
	var counts []int
	for _, word := range strings.Split(o.counts, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 || len(counts) > 0 && n <= counts[len(counts)-1] {
			return nil, fmt.Errorf("bad --counts %q, want rising numbers", o.counts)
		}
		counts = append(counts, n)
	}
	before := sampleAll(o.watch)
	var conns []opened
	var steps []map[string]any
	errs := map[string]int{}
	for _, count := range counts {
		begin := time.Now()
		more, failed := openSome(d, count-len(conns), o.parallel)
		opening, added := time.Since(begin), count-len(conns)
		conns = append(conns, more...)
		for text, n := range failed {
			errs[text] += n
		}
		time.Sleep(o.hold)
		memory := map[string]any{}
		for name, now := range sampleAll(o.watch) {
			memory[name] = map[string]any{
				"rss_kb":       now.rssKB,
				"kib_per_conn": round(float64(now.rssKB-before[name].rssKB)/float64(max(len(conns), 1)), 1),
			}
		}
		step := map[string]any{
			"count": count, "open": len(conns), "procs": memory,
			"open_s": round(float64(added)/opening.Seconds(), 1),
		}
		one := *o
		one.parallel, one.count = 1, 0
		dialled, err := dials(d, &one)
		if err != nil {
			return nil, err
		}
		step["dials_s"] = dialled["dials_s"]
		for text, n := range dialled["errors"].(map[string]int) {
			errs[text] += n
		}
		if len(conns) > 0 {
			trips, err := roundTrips(conns[0].conn, interactive, o.duration)
			if err != nil {
				errs[fmt.Sprintf("round trip: %v", err)]++
			}
			step["us"] = quantiles(trips, time.Microsecond)
		}
		steps = append(steps, step)
	}
	return map[string]any{"steps": steps, "release": releaseAll(conns), "errors": errs}, nil
}

// openSome opens n connections, at most parallel at a time, and returns those
// that could be opened.
func openSome(d *dialer, n, parallel int) ([]opened, map[string]int) {
	var mu sync.Mutex
	var conns []opened
	var failed errorCounts
	var wg sync.WaitGroup
	slots := make(chan struct{}, max(parallel, 1))
	for range n {
		slots <- struct{}{}
		wg.Add(1)
		go func() {
			defer func() { <-slots; wg.Done() }()
			conn, release, err := d.dial(context.Background(), d.target)
			if err != nil {
				failed.add(err)
				return
			}
			mu.Lock()
			conns = append(conns, opened{conn, release})
			mu.Unlock()
		}()
	}
	wg.Wait()
	return conns, failed.m
}
