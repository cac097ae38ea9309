// Goldenbytes prints packets as Go's protobuf encodes them, as a JSON list for tests/proto/golden.json:
//
//	go run ./goldenbytes > ../tests/proto/golden.json
//
// An entry's encoding is its hex followed by tail_length times tail_byte: large payloads are one byte
// repeated, so that every width of a length fits in a file that can be read.
package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"

	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

const tailByte = 0xab

type entry struct {
	Name       string         `json:"name"`
	Hex        string         `json:"hex"`
	TailByte   int            `json:"tail_byte"`
	TailLength int            `json:"tail_length"`
	Type       int32          `json:"type"`
	Payload    string         `json:"payload"`
	Fields     map[string]any `json:"fields"`
}

// describe names the payload and its fields as the Python package does; bytes are hex, without the tail.
func describe(p *client.Packet, tail int) (string, map[string]any) {
	switch x := p.Payload.(type) {
	case *client.Packet_DialRequest:
		r := x.DialRequest
		return "DialRequest", map[string]any{"protocol": r.Protocol, "address": r.Address, "random": r.Random}
	case *client.Packet_DialResponse:
		r := x.DialResponse
		return "DialResponse", map[string]any{"error": r.Error, "connect_id": r.ConnectID, "random": r.Random}
	case *client.Packet_Data:
		d := x.Data
		data := d.Data[:len(d.Data)-tail]
		return "Data", map[string]any{"connect_id": d.ConnectID, "error": d.Error, "data": hex.EncodeToString(data)}
	case *client.Packet_CloseRequest:
		return "CloseRequest", map[string]any{"connect_id": x.CloseRequest.ConnectID}
	case *client.Packet_CloseResponse:
		r := x.CloseResponse
		return "CloseResponse", map[string]any{"error": r.Error, "connect_id": r.ConnectID}
	case *client.Packet_CloseDial:
		return "CloseDial", map[string]any{"random": x.CloseDial.Random}
	case *client.Packet_Drain:
		return "Drain", map[string]any{}
	}
	return "", map[string]any{}
}

func main() {
	var entries []entry
	add := func(name string, p *client.Packet, tail int) {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
		if err != nil {
			fmt.Fprintf(os.Stderr, "goldenbytes: %s: %v\n", name, err)
			os.Exit(1)
		}
		payload, fields := describe(p, tail)
		e := entry{Name: name, Hex: hex.EncodeToString(b[:len(b)-tail]), Type: int32(p.Type), Payload: payload, Fields: fields}
		if tail > 0 {
			e.TailByte, e.TailLength = tailByte, tail
		}
		entries = append(entries, e)
	}
	dialReq := func(name string, r *client.DialRequest) {
		add(name, &client.Packet{Payload: &client.Packet_DialRequest{DialRequest: r}}, 0)
	}
	dialRsp := func(name string, r *client.DialResponse) {
		add(name, &client.Packet{Type: client.PacketType_DIAL_RSP, Payload: &client.Packet_DialResponse{DialResponse: r}}, 0)
	}
	closeReq := func(name string, r *client.CloseRequest) {
		add(name, &client.Packet{Type: client.PacketType_CLOSE_REQ, Payload: &client.Packet_CloseRequest{CloseRequest: r}}, 0)
	}
	closeRsp := func(name string, r *client.CloseResponse) {
		add(name, &client.Packet{Type: client.PacketType_CLOSE_RSP, Payload: &client.Packet_CloseResponse{CloseResponse: r}}, 0)
	}
	data := func(name string, d *client.Data, tail int) {
		d.Data = append(d.Data, bytes.Repeat([]byte{tailByte}, tail)...)
		add(name, &client.Packet{Type: client.PacketType_DATA, Payload: &client.Packet_Data{Data: d}}, tail)
	}
	closeDial := func(name string, r *client.CloseDial) {
		add(name, &client.Packet{Type: client.PacketType_DIAL_CLS, Payload: &client.Packet_CloseDial{CloseDial: r}}, 0)
	}

	for t := client.PacketType_DIAL_REQ; t <= client.PacketType_DRAIN; t++ {
		add("bare "+t.String(), &client.Packet{Type: t}, 0)
	}
	add("bare unknown type", &client.Packet{Type: 99}, 0)
	add("bare negative type", &client.Packet{Type: -1}, 0)
	add("bare smallest type", &client.Packet{Type: math.MinInt32}, 0)
	add("bare largest type", &client.Packet{Type: math.MaxInt32}, 0)
	add("unknown type with a payload", &client.Packet{Type: 7, Payload: &client.Packet_Drain{Drain: &client.Drain{}}}, 0)
	add("payload of another type", &client.Packet{
		Type:    client.PacketType_DATA,
		Payload: &client.Packet_CloseDial{CloseDial: &client.CloseDial{Random: 5}},
	}, 0)

	dialReq("dial request of zeros", &client.DialRequest{})
	dialReq("dial request", &client.DialRequest{Protocol: "tcp", Address: "10.0.0.1:6443", Random: 1})
	dialReq("dial request largest random", &client.DialRequest{Protocol: "tcp", Address: "[::1]:443", Random: math.MaxInt64})
	dialReq("dial request smallest random", &client.DialRequest{Protocol: "udp", Random: math.MinInt64})
	dialReq("dial request in UTF-8", &client.DialRequest{Address: "größe.例え.🚇:80", Random: 6148914691236517205})

	dialRsp("dial response of zeros", &client.DialResponse{})
	dialRsp("dial response", &client.DialResponse{ConnectID: 1, Random: 8608480567731124087})
	dialRsp("dial response error", &client.DialResponse{Error: "dial tcp 10.0.0.1:1: connect: connection refused", Random: 3})
	dialRsp("dial response negative", &client.DialResponse{Error: "\x00", ConnectID: -1, Random: -2})

	closeReq("close request of zeros", &client.CloseRequest{})
	closeReq("close request", &client.CloseRequest{ConnectID: 300})
	closeReq("close request negative", &client.CloseRequest{ConnectID: -300})

	closeRsp("close response of zeros", &client.CloseResponse{})
	closeRsp("close response", &client.CloseResponse{ConnectID: math.MaxInt32})
	closeRsp("close response error", &client.CloseResponse{Error: "Verbindung geschlossen – Ende", ConnectID: math.MaxInt64})
	closeRsp("close response negative", &client.CloseResponse{ConnectID: math.MinInt64})

	closeDial("close dial of zeros", &client.CloseDial{})
	closeDial("close dial", &client.CloseDial{Random: math.MaxInt64})
	closeDial("close dial negative", &client.CloseDial{Random: -1})

	add("drain", &client.Packet{Type: client.PacketType_DRAIN, Payload: &client.Packet_Drain{Drain: &client.Drain{}}}, 0)

	data("data of zeros", &client.Data{}, 0)
	data("data without an identifier", &client.Data{Data: []byte("hello")}, 0)
	data("data with an error", &client.Data{ConnectID: 1, Error: "größer", Data: []byte{0, 255}}, 0)
	data("data negative", &client.Data{ConnectID: -1, Data: []byte("x")}, 0)
	data("data without bytes", &client.Data{ConnectID: 12}, 0)
	// Both sides of every width of the identifier, then of the lengths.
	for id := int64(1); id > 0; id <<= 7 {
		data(fmt.Sprintf("data of connection %d", id), &client.Data{ConnectID: id, Data: []byte{1, 2, 3}}, 0)
		data(fmt.Sprintf("data of connection %d", id<<6|id-1), &client.Data{ConnectID: id<<6 | id - 1, Data: []byte{4}}, 0)
	}
	data("data of the last connection", &client.Data{ConnectID: math.MaxInt64, Data: []byte{5}}, 0)
	for _, n := range []int{1, 100, 123, 124, 127, 128, 16379, 16380, 16383, 16384, 32768, 2097146, 2097147, 2097151, 2097152, 4194000} {
		data(fmt.Sprintf("data of %d bytes", n), &client.Data{ConnectID: 1}, n)
		data(fmt.Sprintf("data of %d bytes, wide identifier", n), &client.Data{ConnectID: 200}, n)
	}

	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	fmt.Print("[")
	for i, e := range entries {
		if i > 0 {
			fmt.Print(",")
		}
		if err := out.Encode(e); err != nil {
			fmt.Fprintf(os.Stderr, "goldenbytes: %v\n", err)
			os.Exit(1)
		}
	}
	fmt.Println("]")
}
