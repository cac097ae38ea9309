package main

import (
	"bytes"
	"io"
	"math/rand"
	"net"
	"testing"
	"time"
)

func TestLineTakesOneChunkAfterTheOther(t *testing.T) {
	l := &line{delay: 50 * time.Millisecond, rate: 125e6}
	begin := time.Unix(1000, 0)
	for i, want := range []time.Duration{60, 70, 80} {
		if got := l.arrival(begin, 1_250_000).Sub(begin); got != want*time.Millisecond {
			t.Errorf("chunk %d arrives after %v, want %d ms", i, got, want)
		}
	}
	// When idle, it saves up nothing.
	later := begin.Add(time.Second)
	if got := l.arrival(later, 1_250_000).Sub(later); got != 60*time.Millisecond {
		t.Errorf("after a pause it arrives after %v, want 60 ms", got)
	}
}

func TestLineWithoutRateOnlyDelays(t *testing.T) {
	l := &line{delay: time.Millisecond}
	begin := time.Unix(1000, 0)
	for range 2 {
		if got := l.arrival(begin, 1<<30).Sub(begin); got != time.Millisecond {
			t.Errorf("arrives after %v, want 1 ms", got)
		}
	}
}

// The ring is smaller than the data and no multiple of the pieces, so that
// pieces wrap around its end.
func TestFlightKeepsTheBytes(t *testing.T) {
	sent := make([]byte, 100_000)
	rand.New(rand.NewSource(1)).Read(sent)
	f := newFlight(1009)
	go func() {
		pieces := rand.New(rand.NewSource(2))
		for rest := sent; len(rest) > 0; {
			n := copy(f.room(), rest[:min(len(rest), 1+pieces.Intn(700))])
			f.take(n, time.Time{})
			rest = rest[n:]
		}
		f.end()
	}()
	var got []byte
	pieces := rand.New(rand.NewSource(3))
	for {
		data, ok := f.next()
		if !ok {
			break
		}
		data = data[:1+pieces.Intn(len(data))]
		got = append(got, data...)
		f.sent(len(data))
	}
	if !bytes.Equal(sent, got) {
		t.Errorf("%d bytes went in, %d other ones came out", len(sent), len(got))
	}
}

func TestFlightIsBounded(t *testing.T) {
	f := newFlight(10)
	f.take(len(f.room()), time.Time{})
	freed := make(chan []byte)
	go func() { freed <- f.room() }()
	data, _ := f.next()
	f.sent(3)
	if room := <-freed; len(data) != 10 || len(room) != 3 {
		t.Errorf("%d bytes were held, %d are free; want 10 and 3", len(data), len(room))
	}
	f.take(3, time.Time{})
	go func() { freed <- f.room() }()
	f.abandon()
	if room := <-freed; room != nil {
		t.Errorf("%d bytes are free after the end", len(room))
	}
}

// A lower bound only: a busy machine takes longer.
func TestRelayTakesTheTimeOfTheLine(t *testing.T) {
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	go func() {
		conn, err := far.Accept()
		if err == nil {
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	near, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	const delay, rate, size = 20 * time.Millisecond, 10e6, 1 << 20
	go func() {
		in, err := near.Accept()
		if err == nil {
			up, down := &line{delay: delay, rate: rate}, &line{delay: delay, rate: rate}
			relay(in.(*net.TCPConn), far.Addr().String(), up, down, 100_000)
		}
	}()

	begin := time.Now()
	conn, err := net.Dial("tcp", near.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, size)
	rand.New(rand.NewSource(1)).Read(sent)
	go func() {
		conn.Write(sent)
		conn.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(sent, got) {
		t.Fatalf("%d bytes came back, want %d: %v", len(got), size, err)
	}
	// A handshake and a round trip, and the bytes at the rate of one way.
	least := 4*delay + time.Duration(size/rate*float64(time.Second))
	if took := time.Since(begin); took < least {
		t.Errorf("took %v, the line would take %v", took, least)
	}
}
