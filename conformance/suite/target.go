package suite

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Target is a TCP service for the far end.
type Target struct {
	Addr string
	ln   net.Listener

	mu    sync.Mutex
	conns []*net.TCPConn
	Conns chan *net.TCPConn // every accepted connection, unless there is a handler
}

// Target starts a service; without a handler connections are delivered on
// Conns.
func (t *T) Target(handler func(*net.TCPConn)) *Target {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	t.Check(err, "listen")
	g := &Target{Addr: ln.Addr().String(), ln: ln, Conns: make(chan *net.TCPConn, 10000)}
	t.Cleanup(g.Close)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			tc := conn.(*net.TCPConn)
			g.mu.Lock()
			g.conns = append(g.conns, tc)
			g.mu.Unlock()
			if handler == nil {
				g.Conns <- tc
				continue
			}
			go func() {
				defer tc.Close()
				handler(tc)
			}()
		}
	}()
	return g
}

// Close stops listening and closes all connections.
func (g *Target) Close() {
	g.ln.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		c.Close()
	}
}

// Accepted is how many connections there have been.
func (g *Target) Accepted() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns)
}

// Accept awaits a connection.
func (t *T) Accept(g *Target) *net.TCPConn {
	select {
	case c := <-g.Conns:
		c.SetDeadline(time.Now().Add(t.Row.Timeout))
		return c
	case <-time.After(patience):
	case <-t.Ctx.Done():
	}
	t.Fatalf("nothing has connected to the target")
	return nil
}

// Echo starts an echo service.
func (t *T) Echo() *Target {
	return t.Target(func(c *net.TCPConn) { io.Copy(struct{ io.Writer }{c}, c) })
}

// HTTP starts a web service and returns its URL.
func (t *T) HTTP(h http.HandlerFunc) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	t.Check(err, "listen")
	srv := &http.Server{Handler: h}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return "http://" + ln.Addr().String() + "/"
}

func hello(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }

// closedPort is an address that refuses connections.
func (t *T) closedPort() string {
	return "127.0.0.1:" + strconv.Itoa(freePort())
}

// blackHole is an address that answers no SYN: a listener whose queue of one
// is full.
func (t *T) blackHole() string {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	t.Check(err, "socket")
	t.Cleanup(func() { syscall.Close(fd) })
	t.Check(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), "bind")
	t.Check(syscall.Listen(fd, 0), "listen")
	name, err := syscall.Getsockname(fd)
	t.Check(err, "getsockname")
	addr := "127.0.0.1:" + strconv.Itoa(name.(*syscall.SockaddrInet4).Port)
	for range 8 {
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatalf("the black hole still answers")
	return ""
}

// reset closes with RST.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
