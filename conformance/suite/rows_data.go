package suite

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ways in which a client reaches the server.
var transports = []struct {
	name string
	o    ServerOpts
}{
	{"gRPC over mTLS", ServerOpts{}},
	{"gRPC over UDS", ServerOpts{UDS: true}},
	// Beside a Go agent each end of a client would last the default, 10 s.
	{"CONNECT over mTLS", ServerOpts{Mode: modeConnect, Linger: "1s"}},
	{"CONNECT over UDS", ServerOpts{Mode: modeConnect, UDS: true, Linger: "1s"}},
}

func init() {
	for i, kind := range []struct {
		what string
		run  func(*T, ServerOpts)
	}{
		{"64 MiB both ways, pieces of 1 B to 1 MiB, hashed", rowBulk},
		{"200 connections at once, hashed", rowManyConnections},
		{"targets that speak first", rowSpeaksFirst},
		{"closed right after a burst, by either end", rowBurstAndClose},
		{"reset by the target in mid-stream", rowReset},
	} {
		for j, tr := range transports {
			register(Row{ID: fmt.Sprintf("D%d%d", i+1, j+1), Title: kind.what + ", " + tr.name, Need: Must, Side: bothSides, Heavy: true,
				Timeout: 120 * time.Second, Run: func(t *T) { kind.run(t, tr.o) }})
		}
	}
	for j, tr := range []int{0, 2} {
		register(Row{ID: fmt.Sprintf("X0%d", j+1), Title: "four others at full rate go on beside one that is unread (beside a Go agent after at most 10 s), " + transports[tr].name, Need: Differ, Side: ServerSide,
			Alone: true, Timeout: 120 * time.Second, Run: func(t *T) { rowIsolation(t, transports[tr].o) }})
	}
}

// source yields the random bytes that belong to a seed.
type source struct {
	rng *rand.ChaCha8
	sum hash.Hash
}

func newSource(seed uint64) *source {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	return &source{rand.NewChaCha8(key), sha256.New()}
}

// writeTo writes n bytes in pieces whose sizes are drawn from [1, largest].
func (s *source) writeTo(w io.Writer, n, largest int, sizes *rand.Rand) error {
	buf := make([]byte, largest)
	for n > 0 {
		// As many small pieces as large ones: the size's logarithm is uniform.
		size := 1
		for size < largest && sizes.IntN(6) > 0 {
			size *= 2 + sizes.IntN(4)
		}
		size = min(size, largest, n)
		s.rng.Read(buf[:size])
		s.sum.Write(buf[:size])
		if _, err := w.Write(buf[:size]); err != nil {
			return err
		}
		n -= size
	}
	return nil
}

// readHash reads n bytes and returns their hash.
func readHash(r io.Reader, n int) ([]byte, error) {
	sum := sha256.New()
	got, err := io.CopyBuffer(sum, io.LimitReader(readerOnly{r}, int64(n)), make([]byte, 70000))
	if err == nil && got < int64(n) {
		err = fmt.Errorf("%d of %d bytes: %w", got, n, io.ErrUnexpectedEOF)
	}
	return sum.Sum(nil), err
}

type readerOnly struct{ io.Reader }

// A peer at the far end that is told by a header what to do: seed and lengths.
// It reads up bytes while it writes down bytes, then sends the hash of what it
// read.
type exchangeHeader struct {
	Seed, Up, Down, Largest uint64
}

func exchangeTarget(c *net.TCPConn) {
	var h exchangeHeader
	if binary.Read(c, binary.BigEndian, &h) != nil {
		return
	}
	done := make(chan []byte, 1)
	go func() {
		sum, err := readHash(c, int(h.Up))
		if err != nil {
			sum = []byte("read failed")
		}
		done <- sum
	}()
	src := newSource(h.Seed + 1)
	if src.writeTo(c, int(h.Down), int(h.Largest), rand.New(rand.NewPCG(h.Seed, 2))) != nil {
		return
	}
	c.Write(<-done)
}

// exchange moves up and down bytes through conn at the same time and checks
// both hashes.
func exchange(conn net.Conn, seed uint64, up, down, largest int) error {
	h := exchangeHeader{seed, uint64(up), uint64(down), uint64(largest)}
	var head bytes.Buffer
	binary.Write(&head, binary.BigEndian, h)
	if _, err := conn.Write(head.Bytes()); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	src := newSource(seed)
	sent := make(chan error, 1)
	go func() { sent <- src.writeTo(conn, up, largest, rand.New(rand.NewPCG(seed, 1))) }()
	got, err := readHash(conn, down)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if err := <-sent; err != nil {
		return fmt.Errorf("write: %w", err)
	}
	want := newSource(seed + 1)
	want.writeTo(io.Discard, down, largest, rand.New(rand.NewPCG(seed, 2)))
	if !bytes.Equal(got, want.sum.Sum(nil)) {
		return errors.New("what the target sent has arrived changed")
	}
	theirs := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return fmt.Errorf("the target's hash: %w", err)
	}
	if !bytes.Equal(theirs, src.sum.Sum(nil)) {
		return fmt.Errorf("what we sent has arrived changed (%q)", theirs[:11])
	}
	return nil
}

func rowBulk(t *T, o ServerOpts) {
	s, a := t.StartPair(o, AgentOpts{})
	g := t.Target(exchangeTarget)
	const conns, each = 4, 8 << 20 // 32 MiB up and 32 MiB down
	var wg sync.WaitGroup
	for n := range conns {
		wg.Go(func() {
			conn, err := s.Dial(t.Ctx, g.Addr)
			if err != nil {
				t.Errorf("connection %d: %v", n, err)
				return
			}
			defer conn.Close()
			if err := exchange(conn, uint64(n)*10+7, each, each, 1<<20); err != nil {
				t.Errorf("connection %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	t.idleAgain(s, a)
}

// idleAgain awaits that nothing is left of all connections.
func (t *T) idleAgain(s *Server, a *Agent) {
	t.Eventually(15*time.Second, func() error {
		if n := a.Metric("open_endpoint_connections"); n != 0 {
			return fmt.Errorf("%v connections of the agent are open", n)
		}
		if n := s.Metric("pending_backend_dials"); n != 0 {
			return fmt.Errorf("%v dials are pending", n)
		}
		return nil
	})
	t.clean(s, a)
}

func rowManyConnections(t *T, o ServerOpts) {
	s, a := t.StartPair(o, AgentOpts{})
	g := t.Target(exchangeTarget)
	const conns = 200
	all := make([]net.Conn, conns)
	var wg sync.WaitGroup
	for n := range conns {
		wg.Go(func() {
			conn, err := s.Dial(t.Ctx, g.Addr)
			if err != nil {
				t.Errorf("connection %d: %v", n, err)
				return
			}
			all[n] = conn
		})
	}
	wg.Wait()
	if !t.Failed() {
		a.WantMetric(conns, "open_endpoint_connections")
		s.WantMetric(conns, "established_connections")
	}
	for n, conn := range all {
		if conn == nil {
			continue
		}
		wg.Go(func() {
			defer conn.Close()
			if err := exchange(conn, uint64(n)*10+8, 160<<10, 160<<10, 64<<10); err != nil {
				t.Errorf("connection %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	t.idleAgain(s, a)
}

func rowSpeaksFirst(t *T, o ServerOpts) {
	s, a := t.StartPair(o, AgentOpts{})
	const size, conns = 100 << 10, 40
	want := newSource(1)
	var greeting bytes.Buffer
	want.writeTo(&greeting, size, 20000, rand.New(rand.NewPCG(1, 1)))
	g := t.Target(func(c *net.TCPConn) {
		c.Write(greeting.Bytes())
		io.Copy(struct{ io.Writer }{c}, c)
	})
	lost := 0
	for n := range conns {
		conn, err := s.Dial(t.Ctx, g.Addr)
		if err != nil {
			lost++
			t.Notef("connection %d: %v", n, err)
			continue
		}
		buf := make([]byte, size)
		if err := readFullWithin(conn, buf, patience); err != nil || !bytes.Equal(buf, greeting.Bytes()) {
			lost++
			t.Notef("greeting %d: %v", n, err)
		} else if err := echoOnce(conn, "thanks"); err != nil {
			t.Errorf("connection %d after its greeting: %v", n, err)
		}
		conn.Close()
	}
	if lost > 0 {
		t.ServerDiffers("%d of %d greetings lost", lost, conns)
		t.mu.Lock()
		t.notes = t.notes[:min(len(t.notes), 3)]
		t.mu.Unlock()
	}
	if err := t.poll(3*time.Second, func() error {
		if n := a.Metric("open_endpoint_connections"); n != 0 {
			return fmt.Errorf("%v connections of the agent are left open", n)
		}
		return nil
	}); err != nil {
		t.ServerDiffers("%v", err)
	}
}

func rowBurstAndClose(t *T, o ServerOpts) {
	s, a := t.StartPair(o, AgentOpts{})
	const size, runs = 1 << 20, 20
	burst := make([]byte, size)
	newSource(3).rng.Read(burst)

	// The target asks for nothing but one byte, sends and closes.
	g := t.Target(func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		c.Write(burst)
	})
	for n := range runs {
		conn := s.MustDial(g.Addr)
		conn.Write([]byte{1})
		type result struct {
			got []byte
			err error
		}
		done := make(chan result, 1)
		go func() {
			got, err := io.ReadAll(conn)
			done <- result{got, err}
		}()
		select {
		case r := <-done:
			if r.err != nil || !bytes.Equal(r.got, burst) {
				t.Errorf("target's burst %d: %d of %d bytes, %v", n, len(r.got), size, r.err)
			}
		case <-time.After(15 * time.Second):
			t.Fatalf("target's burst %d: no EOF", n)
		}
		conn.Close()
	}

	// The client sends and closes.
	results := make(chan []byte, runs)
	sink := t.Target(func(c *net.TCPConn) {
		got, _ := io.ReadAll(c)
		results <- got
	})
	// All at once: a CONNECT client's end waits for --half-close-linger.
	var wg sync.WaitGroup
	for n := range runs {
		wg.Go(func() {
			conn, err := s.Dial(t.Ctx, sink.Addr)
			if err != nil {
				t.Errorf("connection %d: %v", n, err)
				return
			}
			defer conn.Close()
			for piece := range slices.Chunk(burst, 32000) {
				if _, err := conn.Write(piece); err != nil {
					t.Errorf("connection %d: write: %v", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	lost := 0
	for range runs {
		select {
		case got := <-results:
			if !bytes.Equal(got, burst) {
				lost++
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("client's burst: the target sees no EOF")
		}
	}
	if lost > 0 {
		// The original's agent discards what it has not written yet (A14).
		t.AgentDiffers("in %d of %d runs the client's last bytes were lost", lost, runs)
	}
	t.idleAgain(s, a)
}

func rowReset(t *T, o ServerOpts) {
	s, a := t.StartPair(o, AgentOpts{})
	g := t.Target(func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1000))
		c.Write(make([]byte, 1000))
		time.Sleep(20 * time.Millisecond)
		reset(c)
	})
	echo := t.Echo()
	bystander := s.MustDial(echo.Addr)
	var wg sync.WaitGroup
	for n := range 20 {
		wg.Go(func() {
			conn, err := s.Dial(t.Ctx, g.Addr)
			if err != nil {
				t.Errorf("connection %d: %v", n, err)
				return
			}
			go func() {
				for {
					if _, err := conn.Write(make([]byte, 5000)); err != nil {
						return
					}
				}
			}()
			done := make(chan struct{})
			go func() {
				io.Copy(io.Discard, conn)
				close(done)
			}()
			if !waitClosed(done, 10*time.Second) {
				t.Errorf("connection %d does not end after the target's reset", n)
			}
			conn.Close()
		})
	}
	wg.Wait()
	t.Check(echoOnce(bystander, "still here"), "another connection")
	bystander.Close()
	t.idleAgain(s, a)
}

// rowIsolation leaves one connection unread and watches four others.
func rowIsolation(t *T, o ServerOpts) {
	allowed, unreadFor := pauseWithoutCredit, pauseWithoutCredit+time.Second
	if t.extended() {
		allowed, unreadFor = pauseWithCredit, 5*time.Second
	}
	s, _ := t.StartPair(o, AgentOpts{})
	src := t.Target(func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	var last [4]atomic.Int64 // when each got its latest bytes
	var total atomic.Int64
	var stopping atomic.Bool
	start := time.Now()
	for i := range last {
		conn := s.MustDial(src.Addr)
		conn.Write([]byte{1})
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					if !stopping.Load() {
						t.Errorf("reader %d: %v", i, err)
					}
					return
				}
				total.Add(int64(n))
				last[i].Store(int64(time.Since(start)))
			}
		}()
	}
	watch := func(what string, d time.Duration) {
		var longest time.Duration
		end := time.Now().Add(d)
		for time.Now().Before(end) && t.Ctx.Err() == nil {
			t.Sleep(50 * time.Millisecond)
			for i := range last {
				longest = max(longest, time.Since(start)-time.Duration(last[i].Load()))
			}
		}
		t.Notef("%s: longest pause of a neighbour %.1f s", what, longest.Seconds())
		if longest > allowed {
			t.Errorf("%s: a neighbour was held up for %.1f s or longer", what, longest.Seconds())
		}
	}
	t.Sleep(time.Second)
	before := total.Load()
	t.Sleep(time.Second)
	t.Notef("alone: %.0f MiB/s", float64(total.Load()-before)/(1<<20))

	ctx, cancel := context.WithTimeout(t.Ctx, 20*time.Second)
	defer cancel()
	unread, err := s.Dial(ctx, src.Addr)
	t.Check(err, "dial of the unread connection")
	unread.Write([]byte{1})
	if s.Mode == modeGRPC {
		watch("stock client that does not read", unreadFor)
		c := s.Client("client that does not read")
		c.Send(dialReq(8, src.Addr))
		r := c.Next().GetDialResponse()
		if r.GetConnectID() == 0 {
			t.Fatalf("dial of the unread connection: %v", r)
		}
		c.StopReading()
		c.Send(data(r.GetConnectID(), []byte{1}))
		watch("client that never reads its stream", unreadFor)
	} else {
		watch("client that does not read its socket", unreadFor)
	}
	stopping.Store(true)
}
