package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// phase is what the neighbours did in one part of an isolation run.
type phase struct {
	rates []float64 // Mbit/s of all together, second by second
	trips []time.Duration
}

// isolation measures neighbours by themselves, and again while one more
// connection is open and nobody reads what is sent on it.
func isolation(d *dialer, o *options) (map[string]any, error) {
	if o.direction != "read" && o.direction != "write" {
		return nil, fmt.Errorf("unknown --direction %q", o.direction)
	}
	if o.echo == "" || o.direction == "write" && o.unread == "" {
		return nil, errors.New("neighbours need --echo, and --unread to write")
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

	var stopping atomic.Bool
	var failed errorCounts
	fail := func(what string, err error) {
		if !stopping.Load() {
			failed.add(fmt.Errorf("%s: %w", what, err))
		}
	}
	moved := make([]atomic.Int64, o.parallel)
	for i := range moved {
		conn := conns[i].conn
		if o.direction == "read" {
			go func() { fail("read", readOn(conn, o.size, &moved[i])) }()
			continue
		}
		go func() { fail("write", writeOn(conn, o.size)) }()
		go func() { fail("read ack", readAcks(conn, &moved[i])) }()
	}
	var mu sync.Mutex
	var trips []time.Duration
	go func() {
		for {
			begin := time.Now()
			if err := echoByte(echo); err != nil {
				fail("round trip", err)
				return
			}
			mu.Lock()
			trips = append(trips, time.Since(begin))
			mu.Unlock()
			time.Sleep(time.Millisecond)
		}
	}()
	measure := func() (p phase) {
		mu.Lock()
		trips = nil
		mu.Unlock()
		for range int(o.duration / time.Second) {
			before, begin := sum(moved), time.Now()
			time.Sleep(time.Second)
			p.rates = append(p.rates, round(float64(sum(moved)-before)*8/1e6/time.Since(begin).Seconds(), 1))
		}
		mu.Lock()
		defer mu.Unlock()
		p.trips = trips
		return p
	}

	time.Sleep(o.warmup)
	before := measure()
	unread, releaseUnread, unreadErr, err := openUnread(d, o, &stopping)
	if err != nil {
		return nil, fmt.Errorf("the unread connection: %w", err)
	}
	while := measure()
	report := map[string]any{
		"direction":     o.direction,
		"mbit_s_before": before.rates, "mbit_s_while": while.rates,
		"rate_ratio":    round(median(while.rates)/median(before.rates), 3),
		"rtt_us_before": quantiles(before.trips, time.Microsecond), "rtt_us_while": quantiles(while.trips, time.Microsecond),
	}
	if p99 := quantiles(before.trips, time.Microsecond)["p99"].(float64); p99 > 0 {
		report["rtt_p99_ratio"] = round(quantiles(while.trips, time.Microsecond)["p99"].(float64)/p99, 3)
	}
	// It must have waited, not ended.
	if o.direction == "read" {
		if _, err := unread.Read(make([]byte, 1)); err != nil {
			failed.add(fmt.Errorf("the unread connection: %w", err))
		}
	} else if err := unreadErr(); err != nil {
		failed.add(fmt.Errorf("the unread connection: %w", err))
	}
	stopping.Store(true)
	releaseAll(append(conns, opened{unread, releaseUnread}))
	failed.mu.Lock()
	defer failed.mu.Unlock()
	report["errors"] = failed.m
	return report, nil
}

// openUnread opens the connection that nobody reads: a source's by us, or a
// hole that is written to. The func returns what has ended the writing so far.
func openUnread(d *dialer, o *options, stopping *atomic.Bool) (net.Conn, func() error, func() error, error) {
	target := d.target
	if o.direction == "write" {
		target = o.unread
	}
	conn, release, err := d.dial(context.Background(), target)
	if err != nil {
		return nil, nil, nil, err
	}
	var mu sync.Mutex
	var ended error
	why := func() error {
		mu.Lock()
		defer mu.Unlock()
		return ended
	}
	if o.direction == "read" {
		_, err = conn.Write([]byte{1})
		return conn, release, why, err
	}
	go func() {
		if err := writeOn(conn, o.size); !stopping.Load() {
			mu.Lock()
			defer mu.Unlock()
			ended = err
		}
	}()
	return conn, release, why, nil
}

func readOn(conn net.Conn, size int, moved *atomic.Int64) error {
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	buf := make([]byte, size)
	for {
		n, err := conn.Read(buf)
		moved.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func writeOn(conn net.Conn, size int) error {
	buf := make([]byte, size)
	for {
		if _, err := conn.Write(buf); err != nil {
			return err
		}
	}
}

func readAcks(conn net.Conn, moved *atomic.Int64) error {
	var ack [8]byte
	for {
		if _, err := io.ReadFull(conn, ack[:]); err != nil {
			return err
		}
		moved.Store(int64(binary.BigEndian.Uint64(ack[:])))
	}
}

func sum(moved []atomic.Int64) (total int64) {
	for i := range moved {
		total += moved[i].Load()
	}
	return total
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}
