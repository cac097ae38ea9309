package main

import (
	"sync"
	"time"
)

// line is one direction of the long line. All connections share its rate.
type line struct {
	delay time.Duration
	rate  float64 // bytes per second; 0: no limit

	mu   sync.Mutex
	free time.Time // when all that was taken so far has been put on the line
}

// arrival takes n bytes and returns when the last of them comes out.
func (l *line) arrival(now time.Time, n int) time.Time {
	if l.rate == 0 {
		return now.Add(l.delay)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	return l.free.Add(l.delay)
}
