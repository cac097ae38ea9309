package suite

import (
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

// The protocol's extension as docs/protocol-extensions.md has it, spoken by
// scripted ends. The stock client's protobuf does not know these packets, so
// they are built by hand as unknown fields.

const extensionKey = "clusterproxy-extensions"

const (
	typeCredit    pb.PacketType = 1001
	typeHalfClose pb.PacketType = 1002
	typeReset     pb.PacketType = 1003
)

const (
	initialCredit = 64 << 10 // of each direction of a connection
	overrun       = 32 << 10 // how far beyond its credit a message may begin
	maxGrant      = 4 << 20  // to a consumer that keeps pace
	grpcPrefix    = 5        // of a message, which counts
)

func extensionPacket(kind pb.PacketType, body []byte) *pb.Packet {
	p := &pb.Packet{Type: kind}
	field := protowire.AppendTag(nil, protowire.Number(kind), protowire.BytesType)
	p.ProtoReflect().SetUnknown(protowire.AppendBytes(field, body))
	return p
}

func appendVarintField(b []byte, number protowire.Number, v int64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), uint64(v))
}

func credit(connID, size int64) *pb.Packet {
	return extensionPacket(typeCredit, appendVarintField(appendVarintField(nil, 1, connID), 2, size))
}

func halfClose(connID int64) *pb.Packet {
	return extensionPacket(typeHalfClose, appendVarintField(nil, 1, connID))
}

func resetPacket(connID int64, reason string) *pb.Packet {
	body := appendVarintField(nil, 1, connID)
	body = protowire.AppendBytes(protowire.AppendTag(body, 2, protowire.BytesType), []byte(reason))
	return extensionPacket(typeReset, body)
}

// extension is a decoded packet of the extension.
type extension struct {
	kind   pb.PacketType
	connID int64
	size   int64
	reason string
}

// parseExtension is nil for a packet of plain konnectivity.
func parseExtension(p *pb.Packet) *extension {
	if p.GetType() <= 1000 {
		return nil
	}
	e := &extension{kind: p.Type}
	for b := []byte(p.ProtoReflect().GetUnknown()); len(b) > 0; {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return e
		}
		b = b[n:]
		if number != protowire.Number(p.Type) || kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return e
			}
			b = b[n:]
			continue
		}
		body, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return e
		}
		b = b[n:]
		e.parseBody(body)
	}
	return e
}

func (e *extension) parseBody(b []byte) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		b = b[n:]
		switch kind {
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return
			}
			b = b[n:]
			switch number {
			case 1:
				e.connID = int64(v)
			case 2:
				e.size = int64(v)
			}
		case protowire.BytesType:
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return
			}
			b = b[n:]
			if number == 2 {
				e.reason = string(v)
			}
		default:
			return
		}
	}
}

func (e *extension) String() string {
	switch e.kind {
	case typeCredit:
		return fmt.Sprintf("CREDIT{id %d size %d}", e.connID, e.size)
	case typeHalfClose:
		return fmt.Sprintf("HALF_CLOSE{id %d}", e.connID)
	case typeReset:
		return fmt.Sprintf("RESET{id %d reason %q}", e.connID, e.reason)
	}
	return fmt.Sprintf("type %d", e.kind)
}

// cost is what a message takes from a sender's credit.
func cost(p *pb.Packet) int64 { return int64(len(marshal(p))) + grpcPrefix }

func offering(versions ...string) metadata.MD {
	md := metadata.MD{}
	md.Append(extensionKey, versions...)
	return md
}

// OfferingAgent connects a scripted agent that offers these versions.
func (s *Server) OfferingAgent(id string, versions ...string) *FakeAgent {
	md := offering(versions...)
	md.Set("agentid", id)
	return s.agentWith("agent "+id, md)
}

// ExtensionAgent connects a scripted agent that speaks the extension; false
// means that the server does not.
func (s *Server) ExtensionAgent(id string) (*FakeAgent, bool) {
	a := s.OfferingAgent(id, "1")
	if got := a.Header.Get(extensionKey); len(got) != 1 || got[0] != "1" {
		s.t.ServerDiffers("an agent's offer of the extension is answered with %q", got)
		return a, false
	}
	return a, true
}

// OfferingClient opens a Proxy stream that offers these versions.
func (s *Server) OfferingClient(name string, versions ...string) *stream {
	target, opts := s.frontDial()
	c, _, _, err := s.t.openStream(name, "/ProxyService/Proxy", target, opts, offering(versions...))
	s.t.Check(err, "open Proxy stream")
	go c.readLoop()
	return c
}

// Accepted are the versions that the server has accepted for a client; it
// waits for the response's headers.
func (s *stream) Accepted() []string {
	type result struct {
		md  metadata.MD
		err error
	}
	ch := make(chan result, 1)
	go func() {
		md, err := s.sm.(grpc.ClientStream).Header()
		ch <- result{md, err}
	}()
	select {
	case r := <-ch:
		s.t.Check(r.err, "%s: headers", s.name)
		return r.md.Get(extensionKey)
	case <-time.After(patience):
		s.t.Fatalf("%s: no response headers", s.name)
	}
	return nil
}

// EstablishWith dials through a scripted agent with a client that offers the
// extension, and checks that the server has accepted it.
func (s *Server) EstablishWith(a *FakeAgent, random, connID int64) *stream {
	c := s.OfferingClient(fmt.Sprintf("client %d", random), "1")
	c.Send(dialReq(random, "127.0.0.1:80"))
	a.Accept(connID)
	c.Want(dialRsp(random, connID))
	if got := c.Accepted(); len(got) != 1 || got[0] != "1" {
		s.t.Fatalf("a client's offer of the extension is answered with %q", got)
	}
	return c
}

// AgentWithExtension starts our agent towards a scripted server that accepts
// the extension; false means that the agent does not offer it.
func (t *T) AgentWithExtension() (*Agent, *AgentStream, bool) {
	f := t.FakeServerHeaders(freePort(), func(int) metadata.MD {
		return metadata.Pairs("serverid", "s", "servercount", "1", extensionKey, "1")
	})
	a, s := t.agentOf(f, AgentOpts{})
	if got := s.MD.Get(extensionKey); len(got) != 1 || got[0] != "1" {
		t.AgentDiffers("the agent offers the extension's versions %q", got)
		return a, s, false
	}
	return a, s, true
}

// sender is a scripted end of a leg with credit: it counts what it may send.
// Packets that are not CREDIT go on to its inbox.
type sender struct {
	*stream
	credit map[int64]int64 // left, by connection
	total  map[int64]int64 // granted in all, with what there is at the start
	inbox  []*pb.Packet
}

func newSender(s *stream) *sender {
	return &sender{stream: s, credit: map[int64]int64{}, total: map[int64]int64{}}
}

func (s *sender) opened(connID int64) {
	s.credit[connID], s.total[connID] = initialCredit, initialCredit
}

// take receives one packet, if there is any in time.
func (s *sender) take(limit time.Duration) bool {
	r, ok := s.next(limit)
	if !ok {
		return false
	}
	if e := parseExtension(r.pkt); e != nil && e.kind == typeCredit {
		if e.size <= 0 {
			s.t.Errorf("%s: received %v", s.name, e)
		}
		s.credit[e.connID] += e.size
		s.total[e.connID] += e.size
		return true
	}
	s.inbox = append(s.inbox, r.pkt)
	return true
}

// sendWithin sends payload in pieces as credit allows, and returns how much of
// it has been sent when no credit has come for so long.
func (s *sender) sendWithin(connID int64, payload []byte, piece int, patience time.Duration) int {
	sent := 0
	for sent < len(payload) && len(s.inbox) == 0 {
		for s.take(0) {
		}
		if s.credit[connID] <= 0 {
			if !s.take(patience) {
				break
			}
			continue
		}
		n := min(piece, len(payload)-sent)
		p := data(connID, payload[sent:sent+n])
		s.Send(p)
		s.credit[connID] -= cost(p)
		sent += n
	}
	return sent
}

// wantInbox awaits the next packet that is not CREDIT.
func (s *sender) wantInbox() *pb.Packet {
	for len(s.inbox) == 0 {
		if !s.take(patience) {
			s.t.Fatalf("%s: nothing received (%s)", s.name, s.endText())
		}
	}
	p := s.inbox[0]
	s.inbox = s.inbox[1:]
	return p
}

// wantData skips CREDIT and collects DATA of one connection.
func (s *sender) wantData(connID int64, n int) []byte {
	var out []byte
	for len(out) < n {
		p := s.wantInbox()
		if p.Type != pb.PacketType_DATA || p.GetData().GetConnectID() != connID {
			s.t.Fatalf("%s: want DATA{%d}, received %s after %d of %d bytes", s.name, connID, show(p), len(out), n)
		}
		out = append(out, p.GetData().GetData()...)
	}
	return out
}
