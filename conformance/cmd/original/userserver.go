package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	konnectivity "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// A userServer makes a tunnel for each request, and asks the service proxy of the cluster through it.
type userServer struct {
	proxy    string
	proxyTLS *tls.Config
	roots    *x509.CertPool
}

func newUserServer(proxy, ca, cert, key string, roots *x509.CertPool) (*userServer, error) {
	proxyRoots, err := pool(ca)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(proxy)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: proxyRoots, Certificates: []tls.Certificate{pair}, ServerName: host}
	return &userServer{proxy, config, roots}, nil
}

// target is what a URL asks for (utils.GetTargetServiceConfig and GetTargetServiceConfigForKubeAPIServer).
type target struct {
	cluster, proto, namespace, service, port, path string
}

func parse(requestURI string) (target, error) {
	parts := strings.Split(requestURI, "/")
	if len(parts) > 9 && parts[8] == "proxy-service" {
		proto, service, port, ok := splitSchemeNamePort(parts[7])
		if !ok {
			return target{}, fmt.Errorf("invalid service name %q", parts[7])
		}
		if proto == "" {
			proto = "https"
		}
		return target{parts[1], proto, parts[5], service, port, withoutQuery(parts[9:])}, nil
	}
	if len(parts) <= 2 {
		return target{}, fmt.Errorf("requestURL format not correct, path more than 2: %s", requestURI)
	}
	return target{parts[1], "https", "default", "kubernetes", "443", withoutQuery(parts[2:])}, nil
}

func withoutQuery(parts []string) string {
	path, _, _ := strings.Cut("/"+strings.Join(parts, "/"), "?")
	return path
}

func splitSchemeNamePort(id string) (scheme, name, port string, ok bool) {
	parts := strings.Split(id, ":")
	switch len(parts) {
	case 1:
		name = parts[0]
	case 2:
		name, port = parts[0], parts[1]
	case 3:
		scheme, name, port = parts[0], parts[1], parts[2]
	default:
		return "", "", "", false
	}
	return scheme, name, port, name != "" && (scheme == "" || scheme == "http" || scheme == "https")
}

func serviceProxyHost(cluster string) string {
	digest := fmt.Sprintf("cluster-%x", sha256.Sum256([]byte(cluster)))
	return digest[:56] + ".open-cluster-management.proxy"
}

func (s *userServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	asked, err := parse(r.RequestURI)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// With the request's context the tunnel would end under an upgraded connection, which httputil still copies.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	tunnel, err := konnectivity.CreateSingleUseGrpcTunnel(ctx, s.proxy,
		grpc.WithTransportCredentials(credentials.NewTLS(s.proxyTLS)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Minute}))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	host := serviceProxyHost(asked.cluster)
	transport := &http.Transport{
		DialContext:           tunnel.DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: s.roots, ServerName: host, MinVersion: tls.VersionTLS12},
		MaxIdleConns:          100,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
	}
	defer transport.CloseIdleConnections()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: host + ":7443"})
	proxy.Transport = transport
	proxy.ErrorHandler = func(w http.ResponseWriter, r *http.Request, err error) {
		if !errors.Is(err, context.Canceled) {
			http.Error(w, "proxy to anp-proxy-server failed because "+err.Error(), http.StatusBadGateway)
		}
	}
	r.URL.Path = asked.path
	r.URL.RawPath = ""
	r.Header.Set("Cluster-Proxy-Proto", asked.proto)
	r.Header.Set("Cluster-Proxy-Namespace", asked.namespace)
	r.Header.Set("Cluster-Proxy-Service", asked.service)
	r.Header.Set("Cluster-Proxy-Port", asked.port)
	proxy.ServeHTTP(w, r)
}
