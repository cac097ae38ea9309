package suite

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

// Rows of what the Go wire cannot say: they are about pairs, for what is
// possible depends on both ends.

func init() {
	for _, kind := range []struct {
		suffix string
		o      ServerOpts
	}{{"", ServerOpts{}}, {"C", ServerOpts{Mode: modeConnect}}} {
		via := "gRPC"
		if kind.o.Mode == modeConnect {
			via = "CONNECT"
		}
		register(Row{ID: "S25" + kind.suffix, Title: "a client that does not read holds nobody up, " + via, Need: Differ, Side: ServerSide,
			Timeout: 90 * time.Second, Run: func(t *T) { rowUnreadClient(t, kind.o) }})
		register(Row{ID: "A13" + kind.suffix, Title: "a target that does not read holds nobody up, " + via, Need: Differ, Side: AgentSide,
			Timeout: 90 * time.Second, Run: func(t *T) { rowUnreadTarget(t, kind.o) }})
	}
	register(Row{ID: "H12", Title: "half-closed by the CONNECT client: the answer arrives", Need: Differ, Side: ServerSide,
		Timeout: 90 * time.Second, Run: rowConnectHalfClose})
}

// extended tells whether both ends of the pair are ours, so that there is
// credit and half-close between them.
func (t *T) extended() bool { return t.Pairing == Pairing{Our, Our} }

// How long a neighbour may pause: beside a Go peer until the unread connection
// is given up.
const (
	pauseWithCredit    = 1200 * time.Millisecond
	pauseWithoutCredit = 10*time.Second + 1500*time.Millisecond
	unreadFor          = 16 * time.Second
)

// neighbours are four connections of the same agent: two that are sent to all
// the time, two that send and await an echo. Their load is light, so that a
// pause is the proxy's and not the machine's.
type neighbours struct {
	t        *T
	last     [4]atomic.Int64
	start    time.Time
	stopping atomic.Bool
}

func (t *T) neighbours(s *Server) *neighbours {
	n := &neighbours{t: t, start: time.Now()}
	stream := t.Target(func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		for piece := make([]byte, 16<<10); ; time.Sleep(10 * time.Millisecond) {
			if _, err := c.Write(piece); err != nil {
				return
			}
		}
	})
	echo := t.Echo()
	for i := range n.last {
		step := func(conn net.Conn) error {
			_, err := conn.Read(make([]byte, 64<<10))
			return err
		}
		addr := stream.Addr
		if i >= 2 {
			addr = echo.Addr
			step = func(conn net.Conn) error {
				time.Sleep(10 * time.Millisecond)
				ping := make([]byte, 1000)
				if _, err := conn.Write(ping); err != nil {
					return err
				}
				_, err := io.ReadFull(conn, ping)
				return err
			}
		}
		conn := s.MustDial(addr)
		conn.Write([]byte{1})
		if i >= 2 {
			io.ReadFull(conn, make([]byte, 1))
		}
		n.last[i].Store(int64(time.Since(n.start)))
		go func() {
			for !n.stopping.Load() {
				if err := step(conn); err != nil {
					if !n.stopping.Load() {
						t.Errorf("neighbour %d: %v", i, err)
					}
					return
				}
				n.last[i].Store(int64(time.Since(n.start)))
			}
		}()
	}
	return n
}

// watch returns the longest pause of a neighbour within d.
func (n *neighbours) watch(d time.Duration) time.Duration {
	var longest time.Duration
	for end := time.Now().Add(d); time.Now().Before(end) && n.t.Ctx.Err() == nil; {
		n.t.Sleep(20 * time.Millisecond)
		for i := range n.last {
			longest = max(longest, time.Since(n.start)-time.Duration(n.last[i].Load()))
		}
	}
	return longest
}

// check watches them while another connection is unread.
func (n *neighbours) check(limit time.Duration) bool {
	longest := n.watch(unreadFor)
	n.t.Notef("longest pause of a neighbour %.2f s", longest.Seconds())
	if longest > limit {
		n.t.Errorf("a neighbour was held up for %.1f s or longer", longest.Seconds())
	}
	return longest <= limit
}

// unread is a client's connection that is not read until it is told to.
type unread struct {
	// readAll reads to the end and returns the bytes; err says how it ended, nil for a clean end.
	readAll func(limit time.Duration) ([]byte, error)
	write   func([]byte) error
}

// openUnread opens one by the server's mode. The gRPC client does not read its
// stream at all.
func (t *T) openUnread(s *Server, address string) unread {
	if s.Mode == modeConnect {
		conn := s.MustDial(address)
		return unread{
			readAll: func(limit time.Duration) ([]byte, error) {
				conn.SetReadDeadline(time.Now().Add(limit))
				return io.ReadAll(conn)
			},
			write: func(b []byte) error {
				_, err := conn.Write(b)
				return err
			},
		}
	}
	c := s.Client("client that does not read")
	c.Send(dialReq(8, address))
	id := c.Next().GetDialResponse().GetConnectID()
	if id == 0 {
		t.Fatalf("the dial of the unread connection failed")
	}
	c.StopReading()
	return unread{
		readAll: func(limit time.Duration) ([]byte, error) {
			c.GoOnReading()
			var got []byte
			for end := time.Now().Add(limit); ; {
				r, ok := c.next(time.Until(end))
				if !ok {
					return got, errors.New(c.endText())
				}
				switch r.pkt.GetType() {
				case pb.PacketType_DATA:
					got = append(got, r.pkt.GetData().GetData()...)
				case pb.PacketType_CLOSE_RSP:
					if text := r.pkt.GetCloseResponse().GetError(); text != "" {
						return got, errors.New(text)
					}
					return got, nil
				default:
					return got, fmt.Errorf("unexpected %s", show(r.pkt))
				}
			}
		},
		write: func(b []byte) error {
			for piece := range slices.Chunk(b, 32000) {
				if err := c.TrySend(marshal(data(id, piece))); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func rowUnreadClient(t *T, o ServerOpts) {
	s, _ := t.StartPair(o, AgentOpts{})
	n := t.neighbours(s)
	defer n.stopping.Store(true)
	// More than all queues and socket buffers on its way can hold.
	payload := hashed(25, 48<<20)
	var written atomic.Int64
	g := t.Target(func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		for piece := range slices.Chunk(payload, 64<<10) {
			if _, err := c.Write(piece); err != nil {
				return
			}
			written.Add(int64(len(piece)))
		}
	})
	n.watch(300 * time.Millisecond)
	u := t.openUnread(s, g.Addr)
	t.Check(u.write([]byte{1}), "start of the unread connection")
	limit := pauseWithoutCredit
	if t.extended() {
		limit = pauseWithCredit
	}
	if !n.check(limit) {
		return
	}
	if w := written.Load(); w == int64(len(payload)) {
		t.Errorf("the target could write %d MiB to a client that does not read", w>>20)
	}
	got, err := u.readAll(20 * time.Second)
	if t.extended() {
		if err != nil || sha256.Sum256(got) != sha256.Sum256(payload) {
			t.Errorf("after %v unread: %d of %d bytes, %v", unreadFor, len(got), len(payload), err)
		}
		return
	}
	// Given up, with a word if there is one for it.
	if err == nil && (s.Mode == modeGRPC || len(got) == len(payload)) {
		t.Errorf("the unread connection ended without an error after %d of %d bytes", len(got), len(payload))
	}
	if !bytes.HasPrefix(payload, got) {
		t.Errorf("the bytes of the unread connection have changed")
	}
	t.Notef("given up after %d bytes: %v", len(got), err)
}

func rowUnreadTarget(t *T, o ServerOpts) {
	s, _ := t.StartPair(o, AgentOpts{})
	n := t.neighbours(s)
	defer n.stopping.Store(true)
	payload := hashed(13, 48<<20)
	g := t.Target(nil)
	n.watch(300 * time.Millisecond)
	u := t.openUnread(s, g.Addr) // it only writes
	c := t.Accept(g)
	c.SetReadBuffer(64 << 10)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := u.write(payload); err != nil && t.extended() {
			t.Errorf("write towards a target that does not read: %v", err)
		}
	})
	limit := pauseWithoutCredit
	if t.extended() {
		limit = pauseWithCredit
	}
	if !n.check(limit) {
		return
	}
	if t.extended() {
		got := make([]byte, len(payload))
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, payload) {
			t.Errorf("after %v unread: %d of %d bytes have arrived, %v", unreadFor, n, len(payload), err)
		}
		wg.Wait()
		return
	}
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(c)
	if !bytes.HasPrefix(payload, got) || len(got) == len(payload) && t.Pairing.Agent == Our {
		t.Errorf("the target finds %d bytes, %v", len(got), err)
	}
	t.Notef("given up after %d bytes: %v", len(got), err)
}

func rowConnectHalfClose(t *T) {
	answer := hashed(12, 1<<20)
	both(t, ServerOpts{Mode: modeConnect}, func(s *Server) {
		a := t.StartAgent(s.AgentPort, AgentOpts{})
		a.WaitReady()
		t.WaitStatus(s.health("/readyz"), 200)
		var wg sync.WaitGroup
		ask := func(what string, handler func(*net.TCPConn)) {
			conn := s.MustDial(t.Target(handler).Addr)
			wg.Go(func() {
				conn.Write([]byte("request"))
				if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Errorf("%s: half-close: %v", what, err)
				}
				conn.SetReadDeadline(time.Now().Add(30 * time.Second))
				if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, answer) {
					t.Errorf("%s over %s: %d of %d bytes of the answer, %v", what, conn.RemoteAddr().Network(), len(got), len(answer), err)
				}
			})
		}
		// Within --half-close-linger, which helps with any agent.
		ask("service that answers in 2 s", func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, len("request")))
			time.Sleep(2 * time.Second)
			c.Write(answer)
		})
		if t.Pairing.Agent == Our {
			ask("service that reads to the end", func(c *net.TCPConn) {
				got, _ := io.ReadAll(c)
				if string(got) != "request" {
					t.Errorf("the service has read %q", got)
				}
				c.Write(answer)
			})
			if s.UDS == "" {
				ask("service that answers in 12 s", func(c *net.TCPConn) {
					io.ReadAll(c)
					time.Sleep(12 * time.Second)
					c.Write(answer)
				})
			}
		}
		wg.Wait()
		s.WantMetric(0, "established_connections")
		a.WantMetric(0, "open_endpoint_connections")
		a.Kill()
	})
}
