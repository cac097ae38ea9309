package suite

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func init() {
	n := func(id string, side Side, need Need, title string, run func(*T)) {
		register(Row{ID: id, Title: title, Need: need, Side: side, Scripted: true, Timeout: 120 * time.Second, Run: run})
	}
	n("N01", ServerSide, Must, "garbage and plain text on every port", rowGarbage)
	n("N02", ServerSide, Must, "wrong or no ALPN", rowWrongALPN)
	n("N03", ServerSide, Must, "no, foreign, other side's certificate", rowCertificates)
	n("N04", ServerSide, Must, "broken HTTP/2 frames", rowBrokenFrames)
	n("N05", ServerSide, Must, "truncated and oversize gRPC messages", rowBrokenMessages)
	register(Row{ID: "N06", Title: "non-canonical encodings beside a second client of the same agent", Need: Must, Side: ServerSide, Run: rowNonCanonical})
	n("N07", ServerSide, Must, "unknown methods on the agent port", rowAgentPortMethods)
	n("N08", ServerSide, Differ, "1,000 mutated client sessions", rowMutatedClients)
	n("N09", ServerSide, Differ, "400 mutated agent sessions", rowMutatedAgents)
	n("N10", AgentSide, Differ, "1,000 mutated messages from a server", rowMutatedServer)
	n("N11", AgentSide, Must, "hostile servers: agent goes on and recovers", rowHostileServers)
	n("N12", ServerSide, Differ, "floods of frames are cut off", rowFloods)
}

// bystander is a client with a connection of its own that must notice nothing.
type bystander struct {
	t  *T
	s  *Server
	a  *FakeAgent
	c  *stream
	id int64
	n  int
}

func (t *T) bystander(o ServerOpts) *bystander {
	s := t.StartServer(o)
	a := s.FakeAgent("good", "host=good")
	return &bystander{t: t, s: s, a: a, c: s.EstablishTo(a, 1, 1, "good:80"), id: 1}
}

// fine checks that all goes on; what tells who is to blame.
func (b *bystander) fine(what string) {
	b.n++
	up, down := []byte(fmt.Sprint("up ", b.n)), []byte(fmt.Sprint("down ", b.n))
	if !b.s.Alive() || !b.c.Open() || !b.a.Open() {
		b.t.Fatalf("%s: the server, the agent's stream or the bystander's has ended", what)
	}
	b.c.Send(data(b.id, up))
	for {
		p := b.a.Next()
		if p.Type == pb.PacketType_DATA && p.GetData().GetConnectID() == b.id {
			if !bytes.Equal(p.GetData().GetData(), up) {
				b.t.Fatalf("%s: the bystander's target was sent %s", what, show(p))
			}
			break
		}
		if p.Type == pb.PacketType_CLOSE_REQ && p.GetCloseRequest().GetConnectID() == b.id {
			b.t.Fatalf("%s: the bystander's connection was closed", what)
		}
	}
	b.a.Send(data(b.id, down))
	b.c.Want(data(b.id, down))
}

// mustClose checks that the other end hangs up.
func (t *T) mustClose(conn net.Conn, what string) {
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, conn)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Errorf("%s: the connection is left open", what)
	}
}

var garbages = map[string]string{
	"random bytes": "\x8f\x01\xfe\xca\x00\x00\x00\x13\x37\xff\xff\xff\xff\x17\x03\x09\r\n\r\n" + strings.Repeat("\xa5\x5a", 500),
	"HTTP/1.1":     "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
	"h2 preface":   http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	"CONNECT":      "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
	"half a hello": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 600),
	"zeros":        strings.Repeat("\x00", 2000),
}

func rowGarbage(t *T) {
	b := t.bystander(ServerOpts{})
	for _, name := range sortedKeys(garbages) {
		for _, port := range []int{b.s.Front, b.s.AgentPort} {
			conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			t.Check(err, "connect")
			io.WriteString(conn, garbages[name])
			conn.(*net.TCPConn).CloseWrite()
			t.mustClose(conn, name+" instead of TLS")
			if name == "h2 preface" {
				continue
			}
			cfg := t.env.Certs.clientTLS(port == b.s.AgentPort)
			cfg.NextProtos = []string{"h2"}
			tc, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), cfg)
			t.Check(err, "connect")
			io.WriteString(tc, garbages[name])
			t.mustClose(tc, name+" within TLS")
		}
	}
	for _, port := range []int{b.s.HealthPort, b.s.AdminPort} {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		t.Check(err, "connect")
		io.WriteString(conn, garbages["random bytes"])
		conn.(*net.TCPConn).CloseWrite()
		t.mustClose(conn, "garbage on a health port")
	}
	b.fine("garbage")
	// A client that connects and says nothing holds nobody up.
	var idle []net.Conn
	for range 50 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", b.s.Front))
		t.Check(err, "connect")
		idle = append(idle, conn)
	}
	b.s.EstablishTo(b.a, 5, 5, "good:80")
	for _, conn := range idle {
		conn.Close()
	}
	b.fine("silent connections")

	u := t.bystander(ServerOpts{UDS: true})
	for _, name := range sortedKeys(garbages) {
		if name == "h2 preface" {
			continue
		}
		conn := u.s.MustFront()
		io.WriteString(conn, garbages[name])
		t.mustClose(conn, name+" over UDS")
	}
	u.fine("garbage over UDS")
}

func rowWrongALPN(t *T) {
	b := t.bystander(ServerOpts{})
	for _, port := range []int{b.s.Front, b.s.AgentPort} {
		for _, protos := range [][]string{{"foo"}, {"http/1.1"}, nil} {
			cfg := t.env.Certs.clientTLS(port == b.s.AgentPort)
			cfg.NextProtos = protos
			conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), cfg)
			if err != nil {
				continue
			}
			io.WriteString(conn, garbages["h2 preface"])
			conn.SetReadDeadline(time.Now().Add(patience))
			got, err := io.ReadAll(conn)
			if len(got) > 0 {
				t.Errorf("ALPN %q: served HTTP/2: % x (%v)", protos, got[:min(len(got), 20)], err)
			} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Errorf("ALPN %q: the connection is left open", protos)
			}
			conn.Close()
		}
		cfg := t.env.Certs.clientTLS(port == b.s.AgentPort)
		cfg.NextProtos = []string{"foo", "h2", "http/1.1"}
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), cfg)
		t.Check(err, "TLS offering h2 among others")
		if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
			t.Errorf("offered h2 among others, got %q", p)
		}
		conn.Close()
	}
	b.fine("wrong ALPN")
}

func rowCertificates(t *T) {
	c := t.env.Certs
	for _, mode := range []string{modeGRPC, modeConnect} {
		s := t.StartServer(ServerOpts{Mode: mode})
		for _, port := range []int{s.Front, s.AgentPort} {
			other := c.Agent
			if port == s.AgentPort {
				other = c.Client
			}
			for name, certs := range map[string][]tls.Certificate{
				"none": nil, "foreign": {c.ForeignClient.TLS}, "other side's": {other.TLS}, "server's own": {c.Frontend.TLS},
			} {
				t.wantTLSRefused(port, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: certs}, name)
				// TLS 1.2 refuses within the handshake.
				t.wantTLSRefused(port, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: certs, MaxVersion: tls.VersionTLS12}, name+", TLS 1.2")
			}
		}
		s.WaitBackends(0)
		s.Kill()
	}
	b := t.bystander(ServerOpts{})
	b.fine("after all")
}

func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	out := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(out[5:], stream)
	return append(out, payload...)
}

func headerBlock(fields ...string) []byte {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for i := 0; i < len(fields); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return buf.Bytes()
}

func proxyHeaders() []byte {
	return headerBlock(":method", "POST", ":scheme", "http", ":path", "/ProxyService/Proxy", ":authority", "x", "content-type", "application/grpc", "user-agent", "grpc-go/1.81.1", "te", "trailers")
}

func rowBrokenFrames(t *T) {
	b := t.bystander(ServerOpts{UDS: true})
	const (
		DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
	)
	open := frame(HEADERS, 4, 1, proxyHeaders())
	huge := []byte{0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1}
	cases := map[string][]byte{
		"DATA of 16 MiB announced":      append(append([]byte{}, open...), huge...),
		"HEADERS of 16 MiB announced":   {0xff, 0xff, 0xff, HEADERS, 4, 0, 0, 0, 1},
		"DATA on stream 0":              frame(DATA, 0, 0, []byte("x")),
		"DATA on an idle stream":        frame(DATA, 0, 5, []byte("x")),
		"HEADERS on stream 0":           frame(HEADERS, 4, 0, proxyHeaders()),
		"HEADERS on an even stream":     frame(HEADERS, 4, 2, proxyHeaders()),
		"bad HPACK":                     frame(HEADERS, 4, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
		"HPACK integer overflow":        frame(HEADERS, 4, 1, bytes.Repeat([]byte{0xff}, 40)),
		"CONTINUATION without HEADERS":  frame(CONT, 4, 1, proxyHeaders()),
		"DATA within a header block":    append(frame(HEADERS, 0, 1, proxyHeaders()), frame(DATA, 0, 1, []byte("x"))...),
		"SETTINGS of 5 bytes":           frame(SETTINGS, 0, 0, []byte("12345")),
		"SETTINGS on a stream":          frame(SETTINGS, 0, 1, nil),
		"SETTINGS window of 2^31":       frame(SETTINGS, 0, 0, []byte{0, 4, 0x80, 0, 0, 0}),
		"PING of 7 bytes":               frame(PING, 0, 0, []byte("1234567")),
		"PING on a stream":              frame(PING, 0, 1, []byte("12345678")),
		"GOAWAY of 4 bytes":             frame(GOAWAY, 0, 0, []byte("1234")),
		"RST_STREAM of 3 bytes":         append(append([]byte{}, open...), frame(RST, 0, 1, []byte("123"))...),
		"WINDOW_UPDATE of 0":            frame(WINDOW, 0, 0, []byte{0, 0, 0, 0}),
		"WINDOW_UPDATE overflow":        append(frame(WINDOW, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff}), frame(WINDOW, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff})...),
		"padding longer than the frame": append(append([]byte{}, open...), frame(DATA, 8, 1, []byte{200, 1, 2})...),
		"PUSH_PROMISE from a client":    frame(PUSH, 4, 1, append([]byte{0, 0, 0, 2}, proxyHeaders()...)),
		"preface twice":                 []byte(http2.ClientPreface),
		"truncated frame header":        {0, 0, 9, DATA},
		"truncated HEADERS":             open[:20],
		"truncated DATA":                append(append([]byte{}, open...), frame(DATA, 0, 1, make([]byte, 100))[:30]...),
		"header block without an end":   frame(HEADERS, 0, 1, proxyHeaders()),
	}
	ends := 0
	for _, name := range sortedKeys(cases) {
		conn := b.s.MustFront()
		io.WriteString(conn, garbages["h2 preface"])
		conn.Write(cases[name])
		if strings.HasPrefix(name, "truncated") || strings.HasPrefix(name, "header block") {
			conn.(*net.UnixConn).CloseWrite()
		}
		conn.SetReadDeadline(time.Now().Add(time.Second))
		rest, err := io.ReadAll(conn)
		if ne, ok := err.(net.Error); ok && ne.Timeout() && !sawEnd(rest) {
			// What only concerns a stream may be ignored; what does not, not.
			t.Notef("%s: neither GOAWAY, RST_STREAM nor EOF", name)
			if !strings.Contains(name, "PUSH") && !strings.Contains(name, "stream 0") {
				t.ServerDiffers("%s: ignored", name)
			}
		} else {
			ends++
		}
		conn.Close()
	}
	t.Notef("%d of %d cases end the stream or the connection", ends, len(cases))
	b.fine("broken frames")
	t.noLeft(b)
}

// sawEnd looks for GOAWAY, RST_STREAM or END_STREAM in what was received.
func sawEnd(raw []byte) bool {
	for len(raw) >= 9 {
		n := int(raw[0])<<16 | int(raw[1])<<8 | int(raw[2])
		if raw[3] == 7 || raw[3] == 3 || (raw[3] <= 1 && raw[4]&1 != 0) {
			return true
		}
		if len(raw) < 9+n {
			return false
		}
		raw = raw[9+n:]
	}
	return false
}

// noLeft checks that only the bystander is left.
func (t *T) noLeft(b *bystander) {
	b.s.WantMetric(1, "grpc_connections", "service_method", "Proxy")
	b.s.WantMetric(1, "established_connections")
	b.s.WantMetric(0, "pending_backend_dials")
}

func rowBrokenMessages(t *T) {
	b := t.bystander(ServerOpts{UDS: true})
	dial := grpcFrame(marshal(dialReq(9, "good:80")))
	prefix := func(flag byte, n uint32, rest ...byte) []byte {
		out := []byte{flag, 0, 0, 0, 0}
		binary.BigEndian.PutUint32(out[1:], n)
		return append(out, rest...)
	}
	for _, c := range []struct {
		name   string
		body   []byte
		end    bool
		status string
	}{
		{"message cut short by END_STREAM", prefix(0, 100, make([]byte, 10)...), true, "13"},
		{"prefix cut short by END_STREAM", []byte{0, 0, 0}, true, "13 0"}, // grpc-go takes it for the end
		{"second message cut short", append(append([]byte{}, dial...), prefix(0, 5, 1)...), true, "13"},
		{"message of 5 MiB announced", prefix(0, 5<<20, 1, 2, 3), false, "8"},
		{"message of 4 GiB announced", prefix(0, 0xffffffff, 1, 2, 3), false, "8"},
		{"message of 4 MiB and a byte announced", prefix(0, 4<<20+1), false, "8"},
		{"compressed flag", prefix(1, 2, 8, 4), false, "13"},
		{"unknown flag", prefix(0x42, 2, 8, 4), false, "13"},
		{"undecodable", prefix(0, 3, 0xff, 0xff, 0xff), false, "13"},
	} {
		h := b.s.RawH2()
		id := h.Request("/ProxyService/Proxy", "application/grpc", false)
		t.Check(h.Data(id, c.body, c.end), "DATA")
		r := h.WantResponse(id)
		if got := r.header["grpc-status"]; !slices.Contains(strings.Fields(c.status), got) {
			t.Errorf("%s: grpc-status %q %q, want %s", c.name, got, r.header["grpc-message"], c.status)
		}
		h.conn.Close()
	}
	b.fine("broken messages")
	b.a.Drain(50 * time.Millisecond)
	b.s.WantMetric(1, "grpc_connections", "service_method", "Proxy")

	// Byte by byte, and several messages in one frame.
	h := b.s.RawH2()
	id := h.Request("/ProxyService/Proxy", "application/grpc", false)
	for _, x := range grpcFrame(marshal(dialReq(10, "good:80"))) {
		t.Check(h.Data(id, []byte{x}, false), "DATA")
	}
	b.a.Accept(10)
	h.WantMessage(id, marshal(dialRsp(10, 10)))
	var several []byte
	for i := range 5 {
		several = append(several, grpcFrame(marshal(data(10, []byte{byte(i)})))...)
	}
	t.Check(h.Data(id, several[:len(several)-3], false), "DATA")
	t.Check(h.Data(id, several[len(several)-3:], true), "DATA")
	for i := range 5 {
		b.a.Want(data(10, []byte{byte(i)}))
	}
	b.a.Want(closeReq(10))
	if r := h.WantResponse(id); r.header["grpc-status"] != "0" {
		t.Errorf("after END_STREAM: %v", r.header)
	}
	b.fine("messages in pieces")
}

// nonCanonical are encodings of DATA that decoders might read differently.
// Those that mean own must be delivered there, those that mean the other's
// connection must reach nobody, and what is no message ends with status 13.
func nonCanonical(mine, other int64) []struct {
	name    string
	raw     []byte
	deliver bool
	broken  bool
} {
	v := func(n int64) []byte { return protowire.AppendVarint(nil, uint64(n)) }
	longer := func(n int64) []byte { // not minimal
		b := v(n)
		b[len(b)-1] |= 0x80
		return append(b, 0x80, 0x00)
	}
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	field := func(tag byte, body []byte) []byte { return cat([]byte{tag}, v(int64(len(body))), body) }
	typ := []byte{0x08, 4}
	id := func(n int64) []byte { return cat([]byte{0x08}, v(n)) }
	pay := field(0x1a, []byte("x"))
	msg := func(body ...[]byte) []byte { return field(0x22, cat(body...)) }
	unknown := cat([]byte{0x78, 5}, field(0x82, nil)[:0], []byte{0x92, 0x01, 2, 'a', 'b'}, []byte{0x7d, 1, 2, 3, 4}, []byte{0x79, 1, 2, 3, 4, 5, 6, 7, 8})
	group := []byte{0x7b, 0x08, 1, 0x7c}
	return []struct {
		name    string
		raw     []byte
		deliver bool
		broken  bool
	}{
		{"canonical", cat(typ, msg(id(mine), pay)), true, false},
		{"connectID twice, own last", cat(typ, msg(id(other), id(mine), pay)), true, false},
		{"connectID twice, the other's last", cat(typ, msg(id(mine), id(other), pay)), false, false},
		{"connectID again behind the payload", cat(typ, msg(id(mine), pay, id(other))), false, false},
		{"two DATA submessages, own last", cat(typ, msg(id(other), pay), msg(id(mine))), true, false},
		{"two DATA submessages, the other's last", cat(typ, msg(id(mine), pay), msg(id(other))), false, false},
		{"type behind the payload", cat(msg(id(mine), pay), typ), true, false},
		{"type twice", cat([]byte{0x08, 2}, typ, msg(id(mine), pay)), true, false},
		{"payload before connectID", cat(typ, msg(pay, id(mine))), true, false},
		{"two payloads", cat(typ, msg(id(mine), field(0x1a, []byte("no")), pay)), true, false},
		{"unknown fields outside", cat(unknown, typ, msg(id(mine), pay), unknown), true, false},
		{"unknown fields inside", cat(typ, msg(unknown, id(mine), unknown, pay, unknown)), true, false},
		{"unknown groups", cat(group, typ, msg(group, id(mine), pay), group), true, false},
		{"error field set", cat(typ, msg(id(mine), field(0x12, []byte("oops")), pay)), true, false},
		{"long varints, own", cat([]byte{0x08}, longer(4), []byte{0x22}, longer(int64(1+len(longer(mine))+len(pay))), []byte{0x08}, longer(mine), pay), true, false},
		{"long varints, the other's", cat(typ, msg(cat([]byte{0x08}, longer(other)), pay)), false, false},
		{"other payload before DATA", cat(field(0x2a, id(other)), typ, msg(id(mine), pay)), true, false},
		{"negative connectID", cat(typ, msg(id(-1), pay)), false, false},
		{"connectID of 2^32 and own", cat(typ, msg(id(mine+1<<32), pay)), false, false},
		{"connectID of 2^32 and the other's", cat(typ, msg(id(other+1<<32), pay)), false, false},
		{"connectID as a string", cat(typ, msg(field(0x0a, v(other)), id(mine), pay)), true, false},
		{"long tag", cat(typ, []byte{0xa2, 0x80, 0x00}, v(int64(len(cat(id(mine), pay)))), id(mine), pay), true, false},
		{"varint of 11 bytes", cat(typ, msg(cat([]byte{0x08}, bytes.Repeat([]byte{0x80}, 10), []byte{1}), pay)), false, true},
		{"varint beyond 64 bits", cat(typ, msg(cat([]byte{0x08}, bytes.Repeat([]byte{0xff}, 9), []byte{2}), pay)), false, false}, // cut to 64 bits by some decoders
		{"length beyond the end", cat(typ, []byte{0x22, 100}, id(mine), pay), false, true},
		{"inner length beyond the end", cat(typ, msg(id(mine), []byte{0x1a, 9, 'x'})), false, true},
		{"field number 0", cat(typ, []byte{0x02, 0}, msg(id(mine), pay)), false, true},
		{"open group", cat(typ, msg(id(mine), pay), []byte{0x7b, 8, 1}), false, true},
		{"wire type 6", cat(typ, msg(id(mine), pay), []byte{0x7e}), false, true},
		{"invalid UTF-8 in error", cat(typ, msg(id(mine), field(0x12, []byte{0xff}), pay)), false, true},
		{"trailing byte", cat(typ, msg(id(mine), pay), []byte{0x08}), false, true},
	}
}

func rowNonCanonical(t *T) {
	s, a := t.StartPair(ServerOpts{}, AgentOpts{})
	g := t.Target(nil)
	victim := s.MustDial(g.Addr)
	vt := t.Accept(g)
	const victimID = 1
	n := byte('a')
	fine := func(what string) {
		n = 'a' + (n-'a'+1)%26
		if _, err := victim.Write([]byte{n}); err != nil {
			t.Fatalf("%s: the bystander's write: %v", what, err)
		}
		buf := make([]byte, 10)
		vt.SetReadDeadline(time.Now().Add(patience))
		k, err := vt.Read(buf)
		if err != nil || string(buf[:k]) != string(n) {
			t.ServerDiffers("%s: the bystander's target got %q (%v), want %q", what, buf[:k], err, n)
			// What was left of it.
			vt.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			io.ReadAll(vt)
		}
		vt.Write([]byte{n})
		if err := readFullWithin(victim, buf[:1], patience); err != nil || buf[0] != n {
			t.Fatalf("%s: the bystander got %q, %v", what, buf[:1], err)
		}
	}
	fine("before")
	for i := range nonCanonical(1, 1) {
		c := s.Client("sender of " + nonCanonical(1, 1)[i].name)
		random := int64(1000 + i)
		c.Send(dialReq(random, g.Addr))
		rsp := c.Next().GetDialResponse()
		mine := rsp.GetConnectID()
		if mine == 0 || mine == victimID {
			t.Fatalf("dial: %v", rsp)
		}
		target := t.Accept(g)
		enc := nonCanonical(mine, victimID)[i]
		c.SendRaw(enc.raw)
		buf := make([]byte, 10)
		if enc.deliver {
			target.SetReadDeadline(time.Now().Add(2 * time.Second))
			if k, err := target.Read(buf); err != nil || string(buf[:k]) != "x" {
				t.Errorf("%s: own target got %q (%v)", enc.name, buf[:k], err)
			}
		} else {
			target.SetReadDeadline(time.Now().Add(150 * time.Millisecond))
			if k, _ := target.Read(buf); k > 0 {
				t.Errorf("%s: own target got %q", enc.name, buf[:k])
			}
		}
		if enc.broken {
			c.WantEnd(codes.Internal, "grpc: failed to unmarshal the received message")
		}
		fine(enc.name)
		c.cancel()
		target.Close()
	}
	if !a.Alive() || a.Metric("open_server_connections") != 1 {
		t.Errorf("the agent's connection has suffered")
	}
	s.WantMetric(1, "grpc_connections", "service_method", "Proxy")
	a.WantMetric(1, "open_endpoint_connections")
}

func rowAgentPortMethods(t *T) {
	b := t.bystander(ServerOpts{})
	for path, message := range map[string]string{
		"/AgentService/Nope":  "unknown method Nope for service AgentService",
		"/ProxyService/Proxy": "unknown service ProxyService",
		"/x.y/Z":              "unknown service x.y",
		"/":                   "malformed method name: \"/\"",
		"nothing":             "malformed method name: \"nothing\"",
	} {
		c, _, _, err := t.openStream(path, path, "passthrough:///"+b.s.agentAddr(), []grpc.DialOption{tlsOption(t.env.Certs.clientTLS(true))}, metadata.Pairs("agentid", "x"))
		t.Check(err, "open stream")
		go c.readLoop()
		c.WantEnd(codes.Unimplemented, message)
	}
	b.fine("unknown methods")
	b.s.WaitBackends(1)
}

// mutate changes bytes at random, always the same for one generator.
func mutate(r *rand.Rand, in []byte) []byte {
	out := bytes.Clone(in)
	for range 1 + r.IntN(3) {
		if len(out) == 0 {
			return []byte{byte(r.Uint32())}
		}
		i := r.IntN(len(out))
		j := min(len(out), i+1+r.IntN(8))
		switch r.IntN(7) {
		case 0:
			out[i] ^= 1 << r.IntN(8)
		case 1:
			out[i] = byte(r.Uint32())
		case 2:
			out = append(out[:i], out[j:]...)
		case 3:
			out = append(out[:i:i], append([]byte{byte(r.Uint32()), byte(r.Uint32())}, out[i:]...)...)
		case 4:
			out = append(out[:j:j], out[i:]...) // doubled
		case 5:
			out = out[:i]
		case 6:
			for k := i; k < j; k++ {
				out[k] = []byte{0, 0xff, 0x7f, 0x80}[r.IntN(4)]
			}
		}
	}
	return out
}

// autopilot answers for an agent: it accepts every dial with the dial's own
// number and echoes the bystander's data, which nobody else can send.
func (b *bystander) autopilot() {
	go func() {
		for {
			r, ok := b.a.next(b.t.Row.Timeout)
			if !ok {
				return
			}
			switch p := r.pkt; p.GetType() {
			case pb.PacketType_DIAL_REQ:
				if q := p.GetDialRequest(); q.GetRandom() > 1 {
					b.a.TrySend(marshal(dialRsp(q.GetRandom(), q.GetRandom())))
				} else {
					b.a.TrySend(marshal(dialErr(q.GetRandom(), "no")))
				}
			case pb.PacketType_DATA:
				if p.GetData().GetConnectID() != b.id {
					continue
				}
				if !bytes.HasPrefix(p.GetData().GetData(), []byte("bystander ")) {
					b.t.Errorf("somebody has written into the bystander's connection: %s", show(p))
				}
				b.a.TrySend(r.raw)
			case pb.PacketType_CLOSE_REQ:
				id := p.GetCloseRequest().GetConnectID()
				if id == b.id {
					b.t.Errorf("somebody has closed the bystander's connection")
				}
				b.a.TrySend(marshal(closeRsp(id, "")))
			}
		}
	}()
}

func (b *bystander) echoes(what string) {
	b.n++
	msg := fmt.Appendf(nil, "bystander %d", b.n)
	if b.c.TrySend(marshal(data(b.id, msg))) != nil || !b.s.Alive() {
		b.t.Fatalf("%s: the bystander's stream has ended (%s)", what, b.c.endText())
	}
	b.c.Want(data(b.id, msg))
}

// clientSession is what a client sends: first up to the dial, then the rest.
// The protobuf messages pass through change before they are framed.
func clientSession(n int64, change func(int, []byte) []byte) (first, rest []byte) {
	msg := func(i int, p *pb.Packet) []byte { return frame(0, 0, 1, grpcFrame(change(i, marshal(p)))) }
	first = []byte(http2.ClientPreface)
	first = append(first, frame(4, 0, 0, nil)...)
	first = append(first, frame(1, 4, 1, proxyHeaders())...)
	first = append(first, msg(0, dialReq(n, "good:80"))...)
	rest = append(rest, frame(4, 1, 0, nil)...)
	rest = append(rest, msg(1, data(n, []byte("some data of a client")))...)
	rest = append(rest, frame(8, 0, 0, []byte{0, 0, 16, 0})...)
	rest = append(rest, frame(6, 0, 0, []byte("pingping"))...)
	rest = append(rest, msg(2, dialCls(77))...)
	rest = append(rest, msg(3, closeReq(n))...)
	rest = append(rest, frame(0, 1, 1, nil)...)
	return first, rest
}

func rss(pid int) int64 {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	pages, _ := strconv.ParseInt(strings.Fields(string(stat))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// play sends a session in two halves and reads what comes until the end or
// until there is silence.
func play(conn net.Conn, first, rest []byte) {
	defer conn.Close()
	buf := make([]byte, 16<<10)
	quiet := func(d time.Duration) bool {
		for {
			conn.SetReadDeadline(time.Now().Add(d))
			if _, err := conn.Read(buf); err != nil {
				ne, ok := err.(net.Error)
				return ok && ne.Timeout()
			}
		}
	}
	conn.SetWriteDeadline(time.Now().Add(patience))
	conn.Write(first)
	if quiet(8 * time.Millisecond) {
		conn.Write(rest)
		quiet(8 * time.Millisecond)
	}
}

func rowMutatedClients(t *T) {
	b := t.bystander(ServerOpts{UDS: true})
	b.autopilot()
	for range 50 { // so that memory has been touched
		first, rest := clientSession(1000, func(_ int, m []byte) []byte { return m })
		conn, err := b.s.FrontConn(t.Ctx)
		t.Check(err, "connect")
		play(conn, first, rest)
	}
	before := rss(b.s.cmd.Process.Pid)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for {
				n := next.Add(1)
				if n > 1000 || t.Ctx.Err() != nil || !b.s.Alive() {
					return
				}
				r := rand.New(rand.NewPCG(1, uint64(n)))
				which := r.IntN(8) // half of them change one message, half the bytes of all
				first, rest := clientSession(1<<40+n, func(i int, m []byte) []byte {
					if i == which {
						return mutate(r, m)
					}
					return m
				})
				switch {
				case which >= 6:
					first = mutate(r, first)
				case which >= 4:
					rest = mutate(r, rest)
				}
				conn, err := b.s.FrontConn(context.Background())
				if err != nil {
					t.Errorf("session %d: connect: %v", n, err)
					return
				}
				play(conn, first, rest)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(50 * time.Millisecond):
		}
		b.echoes(fmt.Sprintf("about session %d", next.Load()))
	}
	t.noLeft(b)
	after := rss(b.s.cmd.Process.Pid)
	t.Notef("memory of the server: %d KiB before, %d KiB after", before>>10, after>>10)
	if after > before+32<<20 {
		t.Errorf("the server has grown from %d to %d KiB", before>>10, after>>10)
	}
}

func rowMutatedAgents(t *T) {
	b := t.bystander(ServerOpts{Strategies: "destHost"})
	b.autopilot()
	headers := headerBlock(":method", "POST", ":scheme", "https", ":path", "/AgentService/Connect", ":authority", "127.0.0.1", "content-type", "application/grpc",
		"user-agent", "grpc-go/1.81.1", "te", "trailers", "agentid", "mutant", "agentidentifiers", "host=mutant&ipv4=1.2.3.4")
	session := func(change func(int, []byte) []byte) (first, rest []byte) {
		first = append(first, http2.ClientPreface...)
		first = append(first, frame(4, 0, 0, nil)...)
		first = append(first, frame(1, 4, 1, headers)...)
		for i, p := range []*pb.Packet{dialRsp(5, 1), data(1, []byte("some data of an agent")), dialErr(6, "no"), closeRsp(1, "x"), dialCls(7), drain(), data(2, nil)} {
			rest = append(rest, frame(0, 0, 1, grpcFrame(change(i, marshal(p))))...)
		}
		return first, append(rest, frame(0, 1, 1, nil)...)
	}
	cfg := t.env.Certs.clientTLS(true)
	cfg.NextProtos = []string{"h2"}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				n := next.Add(1)
				if n > 400 || t.Ctx.Err() != nil || !b.s.Alive() {
					return
				}
				r := rand.New(rand.NewPCG(2, uint64(n)))
				which := r.IntN(11)
				first, rest := session(func(i int, m []byte) []byte {
					if i == which {
						return mutate(r, m)
					}
					return m
				})
				switch {
				case which >= 9:
					first = mutate(r, first)
				case which >= 7:
					rest = mutate(r, rest)
				}
				conn, err := tls.Dial("tcp", b.s.agentAddr(), cfg)
				if err != nil {
					t.Errorf("session %d: connect: %v", n, err)
					return
				}
				play(conn, first, rest)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(50 * time.Millisecond):
		}
		b.echoes(fmt.Sprintf("about session %d", next.Load()))
	}
	b.s.WantMetric(1, "grpc_connections", "service_method", "Connect")
	b.s.WantMetric(1, "ready_backends", "proxy_strategy", "destHost")
	t.noLeft(b)
}

func rowMutatedServer(t *T) {
	var mu sync.Mutex
	taken := map[string]bool{}
	f := t.FakeServerHeaders(freePort(), func(n int) metadata.MD {
		mu.Lock()
		defer mu.Unlock()
		id := "good"
		if taken[id] {
			id = "bad"
		}
		taken[id] = true
		return metadata.Pairs("serverid", id, "servercount", "2")
	})
	a := t.StartAgent(f.Port, AgentOpts{})
	good, bad := f.Agent(), f.Agent()
	a.WantMetric(2, "open_server_connections")
	g := t.Echo()
	id := good.Dial(1, g.Addr)
	before := rss(a.cmd.Process.Pid)
	reconnects := 0
	for n := range 1000 {
		r := rand.New(rand.NewPCG(3, uint64(n)))
		base := []*pb.Packet{data(1, []byte("some data of a server")), closeReq(1), dialCls(5), closeRsp(1, "x"), dialRsp(5, 6), drain(), data(1<<40, nil)}
		raw := mutate(r, marshal(base[r.IntN(len(base))]))
		if bad.TrySend(raw) != nil || !bad.Open() {
			reconnects++
			bad.Finish(nil)
			if !a.Alive() {
				t.Fatalf("message %d: the agent has ended", n)
			}
			bad = f.Agent()
			bad.Dial(1, g.Addr)
		}
		if n%20 == 19 {
			msg := fmt.Append(nil, "bystander ", n)
			if good.TrySend(marshal(data(id, msg))) != nil {
				t.Fatalf("about message %d: the other stream has ended", n)
			}
			good.Want(data(id, msg))
			bad.Drain(time.Millisecond)
		}
	}
	t.Notef("%d times the agent has connected anew", reconnects)
	good.Send(closeReq(id))
	good.Want(closeRsp(id, ""))
	after := rss(a.cmd.Process.Pid)
	t.Notef("memory of the agent: %d KiB before, %d KiB after", before>>10, after>>10)
	if after > before+32<<20 {
		t.Errorf("the agent has grown from %d to %d KiB", before>>10, after>>10)
	}
}

func rowHostileServers(t *T) {
	f := t.FakeServer("good")
	c := t.env.Certs
	serve := func(cfg *tls.Config, what string) func(net.Conn) {
		return func(conn net.Conn) {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			tc := tls.Server(conn, cfg)
			if tc.Handshake() != nil {
				return
			}
			io.WriteString(tc, what)
			io.Copy(io.Discard, tc)
		}
	}
	plain := func(what string) func(net.Conn) {
		return func(conn net.Conn) {
			io.WriteString(conn, what)
			conn.Close()
		}
	}
	h2 := &tls.Config{Certificates: []tls.Certificate{c.Cluster.TLS}, NextProtos: []string{"h2"}}
	settings := string(frame(4, 0, 0, nil))
	hostile := []struct {
		name string
		do   func(net.Conn)
	}{
		{"hangs up", func(conn net.Conn) { conn.Close() }},
		{"plain text", plain("HTTP/1.1 400 Bad Request\r\n\r\n")},
		{"garbage", plain(garbages["random bytes"])},
		{"foreign certificate", serve(&tls.Config{Certificates: []tls.Certificate{c.ForeignLeaf.TLS}, NextProtos: []string{"h2"}}, settings)},
		{"certificate of the other CA", serve(&tls.Config{Certificates: []tls.Certificate{c.Frontend.TLS}, NextProtos: []string{"h2"}}, settings)},
		{"client's certificate as server", serve(&tls.Config{Certificates: []tls.Certificate{c.Agent.TLS}, NextProtos: []string{"h2"}}, settings)},
		{"no ALPN", serve(&tls.Config{Certificates: []tls.Certificate{c.Cluster.TLS}}, settings)},
		{"other ALPN", serve(&tls.Config{Certificates: []tls.Certificate{c.Cluster.TLS}, NextProtos: []string{"http/1.1"}}, settings)},
		{"garbage within TLS", serve(h2, garbages["random bytes"])},
		{"HTTP/1.1 within TLS", serve(h2, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")},
		{"GOAWAY at once", serve(h2, settings+string(frame(7, 0, 0, make([]byte, 8))))},
		{"frame of 16 MiB", serve(h2, settings+"\xff\xff\xff\x00\x00\x00\x00\x00\x01")},
		{"RST_STREAM at once", serve(h2, settings+string(frame(3, 0, 1, []byte{0, 0, 0, 7})))},
		{"bad header block", serve(h2, settings+string(frame(1, 4, 1, bytes.Repeat([]byte{0xff}, 30))))},
		{"HTTP status 503", serve(h2, settings+string(frame(1, 5, 1, headerBlock(":status", "503", "content-type", "text/html"))))},
		{"trailers only, status 16", serve(h2, settings+string(frame(1, 5, 1, headerBlock(":status", "200", "content-type", "application/grpc", "grpc-status", "16", "grpc-message", "go%20away"))))},
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	t.Check(err, "listen")
	t.Cleanup(func() { ln.Close() })
	var turn atomic.Int64
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			if n := int(turn.Add(1)) - 1; n < len(hostile) {
				go hostile[n].do(conn)
				continue
			}
			go func() {
				out, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", f.Port))
				if err != nil {
					conn.Close()
					return
				}
				go func() { io.Copy(out, conn); out.Close() }()
				io.Copy(conn, out)
				conn.Close()
			}()
		}
	}()
	a := t.StartAgent(ln.Addr().(*net.TCPAddr).Port, AgentOpts{})
	t.Eventually(80*time.Second, func() error {
		if !a.Alive() {
			t.Fatalf("the agent has ended at %q", hostile[min(int(turn.Load()), len(hostile))-1].name)
		}
		n := int(turn.Load())
		if n <= len(hostile) {
			if code, _, _ := httpGet(a.health("/readyz")); code == 200 && int(turn.Load()) <= len(hostile) {
				t.Errorf("ready with a hostile server (%q)", hostile[max(n, 1)-1].name)
			}
			return fmt.Errorf("stuck at %q", hostile[max(n, 1)-1].name)
		}
		return nil
	})
	s := f.Agent()
	a.WaitReady()
	id := s.Dial(1, t.Echo().Addr)
	s.Send(data(id, []byte("x")))
	s.Want(data(id, []byte("x")))
}

func rowFloods(t *T) {
	b := t.bystander(ServerOpts{UDS: true})
	preface := []byte(garbages["h2 preface"])
	reset := func(i int) []byte {
		id := uint32(2*i + 1)
		return append(frame(1, 4, id, proxyHeaders()), frame(3, 0, id, []byte{0, 0, 0, 8})...)
	}
	open := frame(1, 4, 1, proxyHeaders())
	for _, c := range []struct {
		name  string
		start []byte
		piece func(int) []byte
		count int
		// It costs the server no more than any other bytes.
		harmless bool
	}{
		{"resets", nil, reset, 20000, false},
		{"pings", nil, func(int) []byte { return frame(6, 0, 0, []byte("12345678")) }, 50000, false},
		{"settings", nil, func(int) []byte { return frame(4, 0, 0, []byte{0, 4, 0, 0, 0xff, 0xff}) }, 50000, false},
		{"empty DATA", open, func(int) []byte { return frame(0, 0, 1, nil) }, 100000, false},
		{"CONTINUATION", frame(1, 0, 1, proxyHeaders()), func(int) []byte { return frame(9, 0, 1, headerBlock("x-filler", strings.Repeat("abcdefgh", 100))) }, 50000, false},
		{"empty CONTINUATION", frame(1, 0, 1, proxyHeaders()), func(int) []byte { return frame(9, 0, 1, nil) }, 100000, false},
		{"priorities", nil, func(i int) []byte { return frame(2, 0, uint32(2*i+1), []byte{0, 0, 0, 0, 16}) }, 100000, true},
		{"unknown frames", nil, func(int) []byte { return frame(0x77, 0, 0, []byte("x")) }, 100000, true},
	} {
		conn := b.s.MustFront()
		conn.SetDeadline(time.Now().Add(15 * time.Second))
		go io.Copy(io.Discard, conn)
		conn.Write(append(append([]byte{}, preface...), c.start...))
		sent, cut := 0, false
		for sent < c.count {
			var batch []byte
			for range 200 {
				batch = append(batch, c.piece(sent)...)
				sent++
			}
			if _, err := conn.Write(batch); err != nil {
				ne, ok := err.(net.Error)
				cut = !(ok && ne.Timeout())
				break
			}
		}
		conn.Close()
		if cut {
			t.Notef("%s: cut off within %d frames", c.name, sent)
		} else if c.harmless {
			t.Notef("%s: %d frames are taken", c.name, sent)
		} else {
			t.ServerDiffers("%s: %d frames are taken", c.name, sent)
		}
		b.fine("a flood of " + c.name)
	}
	t.noLeft(b)
}
