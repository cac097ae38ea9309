"""The small HTTP/1.1 server (h11 on a trio stream) behind the health and admin ports."""

from clusterproxy.http1.messages import Request as Request
from clusterproxy.http1.messages import Response as Response
from clusterproxy.http1.server import Handler as Handler
from clusterproxy.http1.server import serve_http as serve_http
