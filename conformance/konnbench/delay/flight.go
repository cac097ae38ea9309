package main

import (
	"sync"
	"time"
)

// mostAtOnce bounds one read and one write. At 1 Gbit/s the line takes 2 ms
// for that much, so larger ones would make the far end see bursts.
const mostAtOnce = 256 << 10

type chunk struct {
	size int
	due  time.Time
}

// flight holds the bytes of one connection that are on the line, in a ring.
// One goroutine puts in (room, take, end) and one takes out (next, sent).
type flight struct {
	ring []byte

	mu      sync.Mutex
	changed *sync.Cond
	start   int // of the oldest byte
	size    int
	chunks  []chunk // oldest first
	ended   bool    // nothing more is put in
	broken  bool    // nothing more is taken out
}

func newFlight(limit int) *flight {
	f := &flight{ring: make([]byte, limit)}
	f.changed = sync.NewCond(&f.mu)
	return f
}

// room waits for free space and returns a piece of it to read into; nil when
// the other end is gone.
func (f *flight) room() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.size == len(f.ring) && !f.broken {
		f.changed.Wait()
	}
	if f.broken {
		return nil
	}
	from := (f.start + f.size) % len(f.ring)
	return f.ring[from:min(from+min(len(f.ring)-f.size, mostAtOnce), len(f.ring))]
}

// take puts in the first n bytes of the last room.
func (f *flight) take(n int, due time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size += n
	f.chunks = append(f.chunks, chunk{n, due})
	f.changed.Broadcast()
}

// end tells that nothing more is put in.
func (f *flight) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.changed.Broadcast()
}

// abandon tells that nothing more is taken out.
func (f *flight) abandon() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = true
	f.changed.Broadcast()
}

// next waits until bytes have come out of the line and returns those that lie
// together, or false when no more will.
func (f *flight) next() ([]byte, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.chunks) == 0 && !f.ended {
		f.changed.Wait()
	}
	if len(f.chunks) == 0 {
		return nil, false
	}
	if wait := time.Until(f.chunks[0].due); wait > 0 {
		f.mu.Unlock()
		time.Sleep(wait)
		f.mu.Lock()
	}
	now, n := time.Now(), 0
	for _, c := range f.chunks {
		if n > 0 && (c.due.After(now) || n+c.size > mostAtOnce) {
			break
		}
		n += c.size
	}
	return f.ring[f.start:min(f.start+n, len(f.ring))], true
}

// sent frees the first n bytes of the last next.
func (f *flight) sent(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.start = (f.start + n) % len(f.ring)
	f.size -= n
	for n > 0 {
		if n < f.chunks[0].size {
			f.chunks[0].size -= n
			break
		}
		n -= f.chunks[0].size
		f.chunks = f.chunks[1:]
	}
	f.changed.Broadcast()
}
