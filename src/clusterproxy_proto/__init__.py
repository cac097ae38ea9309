"""The wire format of konnectivity (apiserver-network-proxy): its one message, `Packet`, without any I/O."""

from clusterproxy_proto.datapath import canonical_data as canonical_data
from clusterproxy_proto.datapath import data_header as data_header
from clusterproxy_proto.datapath import run_end as run_end
from clusterproxy_proto.packet import CloseDial as CloseDial
from clusterproxy_proto.packet import CloseRequest as CloseRequest
from clusterproxy_proto.packet import CloseResponse as CloseResponse
from clusterproxy_proto.packet import Credit as Credit
from clusterproxy_proto.packet import Data as Data
from clusterproxy_proto.packet import DecodeError as DecodeError
from clusterproxy_proto.packet import DialRequest as DialRequest
from clusterproxy_proto.packet import DialResponse as DialResponse
from clusterproxy_proto.packet import Drain as Drain
from clusterproxy_proto.packet import HalfClose as HalfClose
from clusterproxy_proto.packet import Packet as Packet
from clusterproxy_proto.packet import PacketType as PacketType
from clusterproxy_proto.packet import Payload as Payload
from clusterproxy_proto.packet import Reset as Reset
from clusterproxy_proto.packet import decode as decode
from clusterproxy_proto.packet import encode as encode
