package suite

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

// rawCodec hands message bytes through, so that rows can send what no
// library would. Its empty name keeps the content-type "application/grpc".
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = bytes.Clone(b)
	return nil
}
func (rawCodec) Name() string { return "" }

// stream is one scripted end of a tunnel: a client, an agent, or a server
// towards an agent. Everything received is queued without limit, unless it is
// told to stop reading.
type stream struct {
	t    *T
	name string
	sm   interface {
		SendMsg(any) error
		RecvMsg(any) error
	}
	sendMu sync.Mutex
	cancel func() // ends the stream rudely (RST_STREAM)
	hangUp func() // closes the connection beneath
	half   func() error

	mu     sync.Mutex
	cond   *sync.Cond
	queue  []received
	err    error // why it ended
	ended  chan struct{}
	paused bool

	// What the peer has sent beyond its credit, in rows of the extension.
	overdraft int64
}

type received struct {
	raw []byte
	pkt *pb.Packet // nil if it cannot be decoded
}

func (t *T) newStream(name string, sm interface {
	SendMsg(any) error
	RecvMsg(any) error
}) *stream {
	s := &stream{t: t, name: name, sm: sm, ended: make(chan struct{}), cancel: func() {}, hangUp: func() {}}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *stream) readLoop() {
	for {
		s.mu.Lock()
		for s.paused {
			s.cond.Wait()
		}
		s.mu.Unlock()
		var raw []byte
		err := s.sm.RecvMsg(&raw)
		s.mu.Lock()
		if err != nil {
			s.err = err
			close(s.ended)
			s.cond.Broadcast()
			s.mu.Unlock()
			return
		}
		r := received{raw: raw}
		pkt := &pb.Packet{}
		if proto.Unmarshal(raw, pkt) == nil {
			r.pkt = pkt
		}
		s.queue = append(s.queue, r)
		s.cond.Broadcast()
		s.mu.Unlock()
	}
}

// StopReading leaves the flow control windows to fill.
func (s *stream) StopReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
}

// GoOnReading undoes StopReading.
func (s *stream) GoOnReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	s.cond.Broadcast()
}

// TrySend sends a message as it is.
func (s *stream) TrySend(raw []byte) error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	return s.sm.SendMsg(&raw)
}

// Send sends packets.
func (s *stream) Send(pkts ...*pb.Packet) {
	for _, p := range pkts {
		s.SendRaw(marshal(p))
	}
}

// SendRaw sends a message as it is.
func (s *stream) SendRaw(raw []byte) {
	if err := s.TrySend(raw); err != nil {
		s.t.Fatalf("%s: send: %v (%v)", s.name, err, s.endText())
	}
}

func (s *stream) endText() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		return "stream is open"
	}
	return "stream ended: " + s.err.Error()
}

// next waits for a message; ok is false at the end or when time is up.
func (s *stream) next(limit time.Duration) (received, bool) {
	expired := false
	wake := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		expired = true
		s.cond.Broadcast()
	}
	timer := time.AfterFunc(limit, wake)
	defer timer.Stop()
	stop := context.AfterFunc(s.t.Ctx, wake)
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) == 0 {
		if s.err != nil || expired {
			return received{}, false
		}
		s.cond.Wait()
	}
	r := s.queue[0]
	s.queue = s.queue[1:]
	return r, true
}

const patience = 5 * time.Second

// Next returns the next packet.
func (s *stream) Next() *pb.Packet {
	r, ok := s.next(patience)
	if !ok {
		s.t.Fatalf("%s: nothing received (%s)", s.name, s.endText())
	}
	if r.pkt == nil {
		s.t.Fatalf("%s: received an undecodable message % x", s.name, r.raw)
	}
	return r.pkt
}

// Want receives exactly these packets, in this order.
func (s *stream) Want(pkts ...*pb.Packet) {
	for _, want := range pkts {
		r, ok := s.next(patience)
		if !ok {
			s.t.Fatalf("%s: want %s, received nothing (%s)", s.name, show(want), s.endText())
		}
		if r.pkt == nil || !proto.Equal(r.pkt, want) {
			got := fmt.Sprintf("% x", r.raw[:min(len(r.raw), 64)])
			if r.pkt != nil {
				got = show(r.pkt)
			}
			s.t.Fatalf("%s: want %s, received %s", s.name, show(want), got)
		}
	}
}

// WantRaw receives exactly these bytes.
func (s *stream) WantRaw(want []byte) {
	r, ok := s.next(patience)
	if !ok {
		s.t.Fatalf("%s: received nothing (%s)", s.name, s.endText())
	}
	if !bytes.Equal(r.raw, want) {
		s.t.Fatalf("%s: message changed: want % x, got % x", s.name, want, r.raw)
	}
}

// WantSet receives these packets in any order.
func (s *stream) WantSet(pkts ...*pb.Packet) {
	for range pkts {
		got := s.Next()
		found := false
		for i, want := range pkts {
			if want != nil && proto.Equal(got, want) {
				pkts[i], found = nil, true
				break
			}
		}
		if !found {
			s.t.Fatalf("%s: unexpected %s", s.name, show(got))
		}
	}
}

// Silence checks that nothing arrives, and that the stream does not end.
func (s *stream) Silence(d time.Duration) {
	if r, ok := s.next(d); ok {
		what := fmt.Sprintf("% x", r.raw)
		if r.pkt != nil {
			what = show(r.pkt)
		}
		s.t.Fatalf("%s: unexpected %s", s.name, what)
	}
	select {
	case <-s.ended:
		s.t.Fatalf("%s: unexpected end (%s)", s.name, s.endText())
	default:
	}
}

// Drain discards what has arrived and arrives until there is silence.
func (s *stream) Drain(quiet time.Duration) []*pb.Packet {
	var out []*pb.Packet
	for {
		r, ok := s.next(quiet)
		if !ok {
			return out
		}
		out = append(out, r.pkt)
	}
}

// WantEnd awaits the end of the stream, packets before it are skipped, and
// checks the status; message is a prefix.
func (s *stream) WantEnd(code codes.Code, message string) {
	if !Within(s.t, s.ended, patience) {
		s.t.Fatalf("%s: the stream did not end", s.name)
	}
	err := s.err
	if errors.Is(err, io.EOF) {
		err = nil
	}
	st := status.Convert(err)
	if st.Code() != code || len(st.Message()) < len(message) || st.Message()[:len(message)] != message {
		s.t.Fatalf("%s: ended with %v %q, want %v %q", s.name, st.Code(), st.Message(), code, message)
	}
}

// WantAnyEnd awaits the end, however it comes.
func (s *stream) WantAnyEnd() {
	if !Within(s.t, s.ended, patience) {
		s.t.Fatalf("%s: the stream did not end", s.name)
	}
}

// Open tells whether the stream has not ended.
func (s *stream) Open() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// HalfClose sends END_STREAM.
func (s *stream) HalfClose() { s.t.Check(s.half(), "%s: half-close", s.name) }

// A fixed, small window lets a peer that does not read block its sender soon,
// and switches grpc-go's estimator off.
const smallWindow = 65536

func (t *T) openStream(name, path, target string, opts []grpc.DialOption, md metadata.MD) (*stream, metadata.MD, *grpc.ClientConn, error) {
	opts = append(opts, grpc.WithInitialWindowSize(smallWindow), grpc.WithInitialConnWindowSize(smallWindow),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(64<<20)))
	cc, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, nil, nil, err
	}
	t.Cleanup(func() { cc.Close() })
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(t.Ctx, md))
	t.Cleanup(cancel)
	cs, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, path)
	if err != nil {
		cancel()
		return nil, nil, nil, err
	}
	s := t.newStream(name, cs)
	s.cancel, s.hangUp, s.half = cancel, func() { cc.Close() }, cs.CloseSend
	return s, nil, cc, nil
}

func tlsOption(cfg *tls.Config) grpc.DialOption {
	return grpc.WithTransportCredentials(credentials.NewTLS(cfg))
}

// frontDial is how a gRPC client reaches the server's frontend.
func (s *Server) frontDial() (string, []grpc.DialOption) {
	if s.UDS != "" {
		return "passthrough:///" + s.UDS, []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", s.UDS)
			}),
		}
	}
	return fmt.Sprintf("passthrough:///127.0.0.1:%d", s.Front), []grpc.DialOption{tlsOption(s.t.env.Certs.clientTLS(false))}
}

// Client opens a Proxy stream.
func (s *Server) Client(name string) *stream {
	target, opts := s.frontDial()
	c, _, _, err := s.t.openStream(name, "/ProxyService/Proxy", target, opts, nil)
	s.t.Check(err, "open Proxy stream")
	go c.readLoop()
	return c
}

// FakeAgent is a scripted agent.
type FakeAgent struct {
	*stream
	Header metadata.MD
}

// agentStream opens a Connect stream with any metadata and does not wait.
func (s *Server) agentStream(name string, md metadata.MD) (*stream, grpc.ClientStream) {
	c, _, _, err := s.t.openStream(name, "/AgentService/Connect", "passthrough:///"+s.agentAddr(), []grpc.DialOption{tlsOption(s.t.env.Certs.clientTLS(true))}, md)
	s.t.Check(err, "open Connect stream")
	return c, c.sm.(grpc.ClientStream)
}

// FakeAgent connects a scripted agent and waits until the server has taken it
// in. Its name is its agent ID, unless that is taken: see SameID.
func (s *Server) FakeAgent(id string, identifiers ...string) *FakeAgent {
	md := metadata.Pairs("agentid", id)
	for _, i := range identifiers {
		md.Append("agentidentifiers", i)
	}
	return s.agentWith("agent "+id, md)
}

// agentWith is FakeAgent with any metadata.
func (s *Server) agentWith(name string, md metadata.MD) *FakeAgent {
	st, cs := s.agentStream(name, md)
	header, err := cs.Header()
	s.t.Check(err, "headers of the Connect stream")
	if len(header.Get("serverid")) != 1 {
		go st.readLoop()
		Within(s.t, st.ended, patience)
		s.t.Fatalf("%s was not taken: headers %v, %s", name, header, st.endText())
	}
	go st.readLoop()
	// The server announces itself just before it adds the backend.
	s.t.Sleep(100 * time.Millisecond)
	return &FakeAgent{stream: st, Header: header}
}

// Accept awaits a DIAL_REQ and answers that it is connected.
func (a *FakeAgent) Accept(connID int64) *pb.DialRequest {
	r := a.WantDial()
	a.Send(dialRsp(r.Random, connID))
	return r
}

// WantDial awaits a DIAL_REQ.
func (s *stream) WantDial() *pb.DialRequest {
	p := s.Next()
	if p.Type != pb.PacketType_DIAL_REQ || p.GetDialRequest() == nil {
		s.t.Fatalf("%s: want DIAL_REQ, received %s", s.name, show(p))
	}
	return p.GetDialRequest()
}

// Establish opens a client stream whose connection the agent has accepted.
func (s *Server) Establish(a *FakeAgent, random, connID int64) *stream {
	return s.EstablishTo(a, random, connID, "127.0.0.1:80")
}

// EstablishTo is Establish to a certain address.
func (s *Server) EstablishTo(a *FakeAgent, random, connID int64, address string) *stream {
	c := s.Client(fmt.Sprintf("client %d", random))
	c.Send(dialReq(random, address))
	a.Accept(connID)
	c.Want(dialRsp(random, connID))
	return c
}

// FakeServer is a scripted proxy server: it hands out agents' streams.
type FakeServer struct {
	t       *T
	Port    int
	Streams chan *AgentStream
	srv     *grpc.Server
	// Header is what a new stream is answered with; it is called for each.
	Header func(n int) metadata.MD

	mu sync.Mutex
	n  int
}

// AgentStream is the server's end of an agent's stream.
type AgentStream struct {
	*stream
	MD       metadata.MD
	Method   string
	ALPN     string
	ServerID string
	finish   chan error
}

// Finish ends the stream with a status.
func (s *AgentStream) Finish(err error) {
	select {
	case s.finish <- err:
	default:
	}
}

// FakeServer starts one that calls itself id and claims to be alone.
func (t *T) FakeServer(id string) *FakeServer {
	return t.FakeServerHeaders(freePort(), func(int) metadata.MD { return metadata.Pairs("serverid", id, "servercount", "1") })
}

// FakeServerHeaders starts one with other answers.
func (t *T) FakeServerHeaders(port int, header func(n int) metadata.MD) *FakeServer {
	f := &FakeServer{t: t, Port: port, Streams: make(chan *AgentStream, 1000), Header: header}
	cfg := &tls.Config{Certificates: []tls.Certificate{t.env.Certs.Cluster.TLS}, ClientCAs: t.env.Certs.ClusterCA.Pool, ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"h2"}}
	f.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)), grpc.ForceServerCodec(rawCodec{}), grpc.MaxRecvMsgSize(64<<20),
		grpc.InitialWindowSize(smallWindow), grpc.InitialConnWindowSize(smallWindow), grpc.UnknownServiceHandler(f.handle))
	ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	t.Check(err, "listen")
	go f.srv.Serve(ln)
	t.Cleanup(f.srv.Stop)
	return f
}

func (f *FakeServer) handle(_ any, ss grpc.ServerStream) error {
	f.mu.Lock()
	n := f.n
	f.n++
	f.mu.Unlock()
	header := f.Header(n)
	if err := ss.SendHeader(header); err != nil {
		return err
	}
	name := "agent's stream"
	s := &AgentStream{stream: f.t.newStream(name, ss), finish: make(chan error, 1)}
	s.MD, _ = metadata.FromIncomingContext(ss.Context())
	s.Method, _ = grpc.MethodFromServerStream(ss)
	if ids := header.Get("serverid"); len(ids) > 0 {
		s.ServerID = ids[0]
	}
	if p, ok := peer.FromContext(ss.Context()); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			s.ALPN = info.State.NegotiatedProtocol
		}
	}
	s.cancel = func() { s.Finish(status.Error(codes.Canceled, "cancelled by the row")) }
	go s.readLoop()
	f.Streams <- s
	select {
	case err := <-s.finish:
		return err
	case <-ss.Context().Done():
		return nil
	}
}

// Count is the number of streams opened so far.
func (f *FakeServer) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// Agent awaits the next agent's stream.
func (f *FakeServer) Agent() *AgentStream {
	select {
	case s := <-f.Streams:
		return s
	case <-time.After(15 * time.Second):
	case <-f.t.Ctx.Done():
	}
	f.t.Fatalf("no agent has connected")
	return nil
}

// Dial asks the agent for a connection and awaits success.
func (s *AgentStream) Dial(random int64, address string) int64 {
	s.Send(dialReq(random, address))
	p := s.Next()
	r := p.GetDialResponse()
	if p.Type != pb.PacketType_DIAL_RSP || r.GetRandom() != random || r.GetError() != "" || r.GetConnectID() == 0 {
		s.t.Fatalf("DIAL_REQ{%d}: answered %s", random, show(p))
	}
	return r.GetConnectID()
}

// Collect receives DATA of one connection until n bytes are there.
func (s *stream) Collect(connID int64, n int) []byte {
	var out []byte
	for len(out) < n {
		p := s.Next()
		if p.Type != pb.PacketType_DATA || p.GetData().GetConnectID() != connID {
			s.t.Fatalf("%s: want DATA{%d}, received %s after %d of %d bytes", s.name, connID, show(p), len(out), n)
		}
		out = append(out, p.GetData().GetData()...)
	}
	return out
}
