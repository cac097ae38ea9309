package suite

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

func dialReq(random int64, address string) *pb.Packet {
	return dialReqProto(random, "tcp", address)
}

func dialReqProto(random int64, protocol, address string) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DIAL_REQ, Payload: &pb.Packet_DialRequest{DialRequest: &pb.DialRequest{Protocol: protocol, Address: address, Random: random}}}
}

func dialRsp(random, connID int64) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DIAL_RSP, Payload: &pb.Packet_DialResponse{DialResponse: &pb.DialResponse{Random: random, ConnectID: connID}}}
}

func dialErr(random int64, text string) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DIAL_RSP, Payload: &pb.Packet_DialResponse{DialResponse: &pb.DialResponse{Random: random, Error: text}}}
}

func dialCls(random int64) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DIAL_CLS, Payload: &pb.Packet_CloseDial{CloseDial: &pb.CloseDial{Random: random}}}
}

func data(connID int64, payload []byte) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DATA, Payload: &pb.Packet_Data{Data: &pb.Data{ConnectID: connID, Data: payload}}}
}

func closeReq(connID int64) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_CLOSE_REQ, Payload: &pb.Packet_CloseRequest{CloseRequest: &pb.CloseRequest{ConnectID: connID}}}
}

func closeRsp(connID int64, text string) *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_CLOSE_RSP, Payload: &pb.Packet_CloseResponse{CloseResponse: &pb.CloseResponse{ConnectID: connID, Error: text}}}
}

func drain() *pb.Packet {
	return &pb.Packet{Type: pb.PacketType_DRAIN, Payload: &pb.Packet_Drain{Drain: &pb.Drain{}}}
}

func marshal(p *pb.Packet) []byte {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil {
		panic(err)
	}
	return raw
}

// show prints a packet for people: kind, numbers, at most a few bytes.
func show(p *pb.Packet) string {
	switch p.Type {
	case pb.PacketType_DIAL_REQ:
		r := p.GetDialRequest()
		return fmt.Sprintf("DIAL_REQ{%s %s random %d}", r.GetProtocol(), r.GetAddress(), r.GetRandom())
	case pb.PacketType_DIAL_RSP:
		r := p.GetDialResponse()
		return fmt.Sprintf("DIAL_RSP{id %d random %d error %q}", r.GetConnectID(), r.GetRandom(), r.GetError())
	case pb.PacketType_CLOSE_REQ:
		return fmt.Sprintf("CLOSE_REQ{id %d}", p.GetCloseRequest().GetConnectID())
	case pb.PacketType_CLOSE_RSP:
		return fmt.Sprintf("CLOSE_RSP{id %d error %q}", p.GetCloseResponse().GetConnectID(), p.GetCloseResponse().GetError())
	case pb.PacketType_DATA:
		d := p.GetData().GetData()
		return fmt.Sprintf("DATA{id %d, %d bytes %.24q}", p.GetData().GetConnectID(), len(d), d)
	case pb.PacketType_DIAL_CLS:
		return fmt.Sprintf("DIAL_CLS{random %d}", p.GetCloseDial().GetRandom())
	case pb.PacketType_DRAIN:
		return "DRAIN"
	}
	if e := parseExtension(p); e != nil {
		return e.String()
	}
	return fmt.Sprintf("type %d", p.Type)
}
