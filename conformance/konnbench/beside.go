package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// beside measures round trips on one connection while --parallel others of
// the same agent read as fast as they can.
func beside(d *dialer, o *options) (map[string]any, error) {
	if o.echo == "" {
		return nil, errors.New("beside needs --echo")
	}
	conns, err := openAll(d, o.parallel)
	if err != nil {
		return nil, err
	}
	echo, releaseEcho, err := d.dial(context.Background(), o.echo)
	if err != nil {
		return nil, fmt.Errorf("echo: %w", err)
	}
	conns = append(conns, opened{echo, releaseEcho})
	var failed errorCounts
	var stopping atomic.Bool
	moved := make([]atomic.Int64, o.parallel)
	for i := range moved {
		go func() {
			if err := readOn(conns[i].conn, o.size, &moved[i]); !stopping.Load() {
				failed.add(fmt.Errorf("read: %w", err))
			}
		}()
	}
	if _, err := roundTrips(echo, interactive, o.warmup); err != nil {
		return nil, fmt.Errorf("round trip: %w", err)
	}
	procBefore, before, begin := sampleAll(o.watch), sum(moved), time.Now()
	trips, err := roundTrips(echo, interactive, o.duration)
	if err != nil {
		failed.add(fmt.Errorf("round trip: %w", err))
	}
	bytes, elapsed, procAfter := sum(moved)-before, time.Since(begin), sampleAll(o.watch)
	stopping.Store(true)
	releaseAll(conns)
	failed.mu.Lock()
	defer failed.mu.Unlock()
	return map[string]any{
		"us":     quantiles(trips, time.Microsecond),
		"mbit_s": round(float64(bytes)*8/1e6/elapsed.Seconds(), 1),
		"procs":  procReport(procBefore, procAfter),
		"errors": failed.m,
	}, nil
}

// interactive is the bytes of one message each way, about a keystroke's.
const interactive = 64

func roundTrips(conn net.Conn, size int, length time.Duration) (trips []time.Duration, err error) {
	message, back := make([]byte, size), make([]byte, size)
	for begin := time.Now(); time.Since(begin) < length; {
		sent := time.Now()
		if _, err := conn.Write(message); err != nil {
			return trips, err
		}
		if _, err := io.ReadFull(conn, back); err != nil {
			return trips, err
		}
		trips = append(trips, time.Since(sent))
	}
	return trips, nil
}
