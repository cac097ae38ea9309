package suite

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strings"
	"time"

	"google.golang.org/grpc"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// Tunnel is a single-use tunnel of the stock client.
type Tunnel struct {
	client.Tunnel
	cancel context.CancelFunc
}

// Tunnel opens one; ctx bounds its life.
func (s *Server) Tunnel(ctx context.Context) (*Tunnel, error) {
	addr, opts := s.frontDial()
	if s.UDS != "" {
		addr = s.UDS // as the API server does: the path ends up in :authority
	} else {
		addr = fmt.Sprintf("127.0.0.1:%d", s.Front)
	}
	opts = append(opts, grpc.WithBlock(), grpc.WithReturnConnectionError()) //nolint:staticcheck // what users of the stock client do
	ctx, cancel := context.WithCancel(ctx)
	createCtx, done := context.WithTimeout(ctx, 15*time.Second)
	defer done()
	tunnel, err := client.CreateSingleUseGrpcTunnelWithContext(createCtx, ctx, addr, opts...)
	if err != nil {
		cancel()
		return nil, err
	}
	return &Tunnel{tunnel, cancel}, nil
}

// MustTunnel fails the row if it cannot be opened.
func (s *Server) MustTunnel() *Tunnel {
	tunnel, err := s.Tunnel(s.t.Ctx)
	s.t.Check(err, "create tunnel")
	s.t.Cleanup(tunnel.cancel)
	return tunnel
}

// WantDone awaits the tunnel's end.
func (s *Server) WantDone(tunnel *Tunnel) {
	if !Within(s.t, tunnel.Done(), 15*time.Second) {
		s.t.Fatalf("the tunnel does not end")
	}
}

// Dial connects to address through the server by whatever its mode is.
func (s *Server) Dial(ctx context.Context, address string) (net.Conn, error) {
	if s.Mode == modeConnect {
		return s.Connect(ctx, address)
	}
	if s.t.env.Client != "" {
		return s.dialOlder(ctx, address)
	}
	tunnel, err := s.Tunnel(s.t.Ctx)
	if err != nil {
		return nil, fmt.Errorf("create tunnel: %w", err)
	}
	conn, err := tunnel.DialContext(ctx, "tcp", address)
	if err != nil {
		tunnel.cancel()
		return nil, fmt.Errorf("dial: %w", err)
	}
	return tunnelConn{conn, tunnel}, nil
}

// tunnelConn ends its tunnel when closed.
type tunnelConn struct {
	net.Conn
	tunnel *Tunnel
}

func (c tunnelConn) Close() error {
	err := c.Conn.Close()
	c.tunnel.cancel()
	return err
}

// MustDial fails the row if there is no connection.
func (s *Server) MustDial(address string) net.Conn {
	conn, err := s.Dial(s.t.Ctx, address)
	s.t.Check(err, "dial through the proxy")
	s.t.Cleanup(func() { go conn.Close() })
	return conn
}

// Front opens a transport connection to the frontend: TLS or Unix.
func (s *Server) FrontConn(ctx context.Context, alpn ...string) (net.Conn, error) {
	if s.UDS != "" {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.UDS)
	}
	cfg := s.t.env.Certs.clientTLS(false)
	cfg.NextProtos = alpn
	return (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", s.Front))
}

// MustFront fails the row if there is no connection.
func (s *Server) MustFront(alpn ...string) net.Conn {
	conn, err := s.FrontConn(s.t.Ctx, alpn...)
	s.t.Check(err, "connect to the frontend")
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(s.t.Row.Timeout))
	return conn
}

const established = "HTTP/1.1 200 Connection Established\r\n\r\n"

// Connect asks for a tunnel by HTTP CONNECT.
func (s *Server) Connect(ctx context.Context, address string) (net.Conn, error) {
	conn, err := s.FrontConn(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", address, address); err != nil {
		conn.Close()
		return nil, err
	}
	head := make([]byte, len(established))
	if n, err := io.ReadFull(conn, head); err != nil {
		conn.Close()
		return nil, fmt.Errorf("answer %q: %w", head[:n], err)
	}
	if string(head) != established {
		conn.Close()
		return nil, fmt.Errorf("answer %q", head)
	}
	return conn, nil
}

// answer is an HTTP answer read from a connection that the other end closes.
type answer struct {
	Status string
	Header http.Header
	Body   string
}

// readAnswer reads to the end of the connection.
func readAnswer(conn net.Conn) (answer, error) {
	conn.SetReadDeadline(time.Now().Add(patience))
	raw, err := io.ReadAll(conn)
	if err != nil {
		return answer{}, fmt.Errorf("no EOF after %q: %w", raw, err)
	}
	return parseAnswer(raw)
}

func parseAnswer(raw []byte) (answer, error) {
	head, body, ok := bytes.Cut(raw, []byte("\r\n\r\n"))
	if !ok {
		return answer{}, fmt.Errorf("no header in %q", raw)
	}
	line, fields, _ := strings.Cut(string(head)+"\r\n", "\r\n")
	// Not http.ReadResponse, which takes "Connection" away.
	header, err := textproto.NewReader(bufio.NewReader(strings.NewReader(fields + "\r\n"))).ReadMIMEHeader()
	if err != nil {
		return answer{}, fmt.Errorf("%q: %w", raw, err)
	}
	return answer{line, http.Header(header), string(body)}, nil
}

// httpClient sends requests through one tunnel.
func (tunnel *Tunnel) httpClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: tunnel.DialContext}}
}

// get fetches a URL through the tunnel.
func get(c *http.Client, url string) (string, error) {
	rsp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer rsp.Body.Close()
	body, err := io.ReadAll(rsp.Body)
	return string(body), err
}

// httpVia is a client whose every connection is a new one through the server.
func (s *Server) httpVia() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return s.Dial(ctx, addr)
	}}}
}

// readWithin is conn.Read with a limit, for the stock client's connections,
// which have no deadlines.
func readFullWithin(conn net.Conn, buf []byte, limit time.Duration) error {
	done := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(conn, buf)
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return errors.New("timed out")
	}
}

// echoOnce sends bytes and awaits them back.
func echoOnce(conn net.Conn, msg string) error {
	if _, err := conn.Write([]byte(msg)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	buf := make([]byte, len(msg))
	if err := readFullWithin(conn, buf, patience); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(buf) != msg {
		return fmt.Errorf("sent %q, received %q", msg, buf)
	}
	return nil
}
