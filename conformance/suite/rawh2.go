package suite

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const h2InitialWindow = http2.SettingInitialWindowSize

// rawH2 is a client connection of which every frame is in the row's hand.
type rawH2 struct {
	t         *T
	conn      net.Conn
	Authority string

	wmu  sync.Mutex
	fr   *http2.Framer
	enc  *hpack.Encoder
	hbuf bytes.Buffer
	next uint32

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced whenever something arrives
	streams  map[uint32]*rawStream
	pings    map[[8]byte]bool
	settings int  // acknowledgements of our SETTINGS
	peer     bool // the peer's SETTINGS have arrived
	goAway   *http2.GoAwayFrame
	goCode   http2.ErrCode
	err      error
	credit   bool
}

type rawStream struct {
	header map[string]string // both headers and trailers
	body   []byte
	bytes  int
	ended  bool
	reset  *http2.ErrCode
}

// RawH2 connects to the frontend and exchanges SETTINGS.
func (s *Server) RawH2() *rawH2 {
	conn, err := s.FrontConn(s.t.Ctx, "h2")
	s.t.Check(err, "connect to the frontend")
	h := newRawH2(s.t, conn)
	s.t.Check(h.Start(), "HTTP/2 preface")
	return h
}

func newRawH2(t *T, conn net.Conn) *rawH2 {
	h := &rawH2{t: t, conn: conn, Authority: "127.0.0.1", next: 1, changed: make(chan struct{}), streams: map[uint32]*rawStream{}, pings: map[[8]byte]bool{}, credit: true}
	h.fr = http2.NewFramer(conn, conn)
	h.fr.SetMaxReadFrameSize(1<<24 - 1)
	h.enc = hpack.NewEncoder(&h.hbuf)
	t.Cleanup(func() { conn.Close() })
	return h
}

// Start sends the preface and reads from then on.
func (h *rawH2) Start() error {
	if _, err := io.WriteString(h.conn, http2.ClientPreface); err != nil {
		return err
	}
	if err := h.fr.WriteSettings(); err != nil {
		return err
	}
	go h.readLoop()
	return h.await(patience, func() bool { return h.peer })
}

func (h *rawH2) write(f func(*http2.Framer) error) error {
	h.wmu.Lock()
	defer h.wmu.Unlock()
	h.conn.SetWriteDeadline(time.Now().Add(patience))
	return f(h.fr)
}

func (h *rawH2) readLoop() {
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := h.fr.ReadFrame()
		h.mu.Lock()
		if err != nil {
			h.err = err
			h.notify()
			h.mu.Unlock()
			return
		}
		var todo func(*http2.Framer) error
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				h.settings++
			} else {
				h.peer = true
				todo = func(fr *http2.Framer) error { return fr.WriteSettingsAck() }
			}
		case *http2.PingFrame:
			if f.IsAck() {
				h.pings[f.Data] = true
			} else {
				data := f.Data
				todo = func(fr *http2.Framer) error { return fr.WritePing(true, data) }
			}
		case *http2.HeadersFrame:
			s := h.stream(f.StreamID)
			fields, err := dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				h.err = err
			}
			for _, field := range fields {
				s.header[field.Name] = field.Value
			}
			s.ended = s.ended || f.StreamEnded()
		case *http2.DataFrame:
			s := h.stream(f.StreamID)
			s.body = append(s.body, f.Data()...)
			s.bytes += int(f.Length)
			s.ended = s.ended || f.StreamEnded()
			if n, id := f.Length, f.StreamID; n > 0 {
				credit, open := h.credit, !s.ended
				todo = func(fr *http2.Framer) error {
					if credit && open {
						fr.WriteWindowUpdate(id, n)
					}
					return fr.WriteWindowUpdate(0, n)
				}
			}
		case *http2.RSTStreamFrame:
			code := f.ErrCode
			h.stream(f.StreamID).reset = &code
		case *http2.GoAwayFrame:
			h.goAway, h.goCode = f, f.ErrCode
		}
		h.notify()
		h.mu.Unlock()
		if todo != nil {
			h.write(todo)
		}
	}
}

func (h *rawH2) notify() {
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *rawH2) stream(id uint32) *rawStream {
	s := h.streams[id]
	if s == nil {
		s = &rawStream{header: map[string]string{}}
		h.streams[id] = s
	}
	return s
}

var errTimedOut = errors.New("timed out")

// await waits until cond, called with the lock held, is true.
func (h *rawH2) await(limit time.Duration, cond func() bool) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		h.mu.Lock()
		ok, err, changed := cond(), h.err, h.changed
		h.mu.Unlock()
		switch {
		case ok:
			return nil
		case err != nil:
			return fmt.Errorf("connection ended: %w", err)
		}
		select {
		case <-changed:
		case <-timer.C:
			return errTimedOut
		case <-h.t.Ctx.Done():
			return h.t.Ctx.Err()
		}
	}
}

// Request opens a stream.
func (h *rawH2) Request(path, contentType string, end bool) uint32 {
	id, err := h.tryRequest(path, contentType, end)
	h.t.Check(err, "HEADERS")
	return id
}

func (h *rawH2) tryRequest(path, contentType string, end bool) (uint32, error) {
	id := h.next
	h.next += 2
	err := h.write(func(fr *http2.Framer) error {
		h.hbuf.Reset()
		for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", h.Authority}, {"content-type", contentType}, {"user-agent", "grpc-go/1.81.1"}, {"te", "trailers"}} {
			h.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		return fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: h.hbuf.Bytes(), EndHeaders: true, EndStream: end})
	})
	return id, err
}

// grpcFrame puts the five bytes of gRPC before a message.
func grpcFrame(msg []byte) []byte {
	out := make([]byte, 5, 5+len(msg))
	binary.BigEndian.PutUint32(out[1:], uint32(len(msg)))
	return append(out, msg...)
}

// Message sends one gRPC message in one DATA frame.
func (h *rawH2) Message(id uint32, msg []byte, end bool) {
	h.t.Check(h.Data(id, grpcFrame(msg), end), "DATA")
}

// Data sends one DATA frame.
func (h *rawH2) Data(id uint32, b []byte, end bool) error {
	return h.write(func(fr *http2.Framer) error { return fr.WriteData(id, end, b) })
}

// Ping sends one and awaits its answer.
func (h *rawH2) Ping(payload [8]byte) {
	h.t.Check(h.write(func(fr *http2.Framer) error { return fr.WritePing(false, payload) }), "PING")
	h.t.Check(h.await(patience, func() bool { return h.pings[payload] }), "answer to PING")
}

// Settings sends one and awaits its acknowledgement.
func (h *rawH2) Settings(id http2.SettingID, val uint32) {
	h.mu.Lock()
	n := h.settings
	h.mu.Unlock()
	h.t.Check(h.write(func(fr *http2.Framer) error { return fr.WriteSettings(http2.Setting{ID: id, Val: val}) }), "SETTINGS")
	h.t.Check(h.await(patience, func() bool { return h.settings > n }), "SETTINGS acknowledgement")
}

// WindowUpdate gives credit.
func (h *rawH2) WindowUpdate(id, n uint32) {
	h.t.Check(h.write(func(fr *http2.Framer) error { return fr.WriteWindowUpdate(id, n) }), "WINDOW_UPDATE")
}

// AutoCredit switches the crediting of streams (not of the connection).
func (h *rawH2) AutoCredit(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.credit = on
}

// DataBytes is how many bytes of DATA a stream has got.
func (h *rawH2) DataBytes(id uint32) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stream(id).bytes
}

// WantMessage awaits the next gRPC message of a stream.
func (h *rawH2) WantMessage(id uint32, want []byte) {
	var got []byte
	err := h.await(patience, func() bool {
		s := h.stream(id)
		if len(s.body) < 5 {
			return false
		}
		n := 5 + int(binary.BigEndian.Uint32(s.body[1:]))
		if len(s.body) < n {
			return false
		}
		got, s.body = s.body[5:n], s.body[n:]
		return true
	})
	h.t.Check(err, "message on stream %d", id)
	if !bytes.Equal(got, want) {
		h.t.Fatalf("stream %d: want message % x, got % x", id, want[:min(len(want), 50)], got[:min(len(got), 50)])
	}
}

// WantResponse awaits the end of a stream.
func (h *rawH2) WantResponse(id uint32) *rawStream {
	h.t.Check(h.await(patience, func() bool { s := h.stream(id); return s.ended || s.reset != nil }), "end of stream %d", id)
	h.mu.Lock()
	defer h.mu.Unlock()
	s := *h.stream(id)
	return &s
}

// Ended awaits the end of the connection, or GOAWAY.
func (h *rawH2) Ended(limit time.Duration) bool {
	return h.await(limit, func() bool { return h.goAway != nil && h.goCode != 0 || h.err != nil }) == nil
}
