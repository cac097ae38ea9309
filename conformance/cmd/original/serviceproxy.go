package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"
)

// A serviceProxy leads to the service that four headers name (utils.GetTargetServiceURLFromRequest), with their Authorization
// as it is: as without --enable-impersonation. Stricter than the original, it takes each of them once only.
type serviceProxy struct {
	transport *http.Transport
}

func newServiceProxy(apiserver string, roots *x509.CertPool) *serviceProxy {
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
	return &serviceProxy{&http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == "kubernetes.default.svc:443" && apiserver != "" {
				address = apiserver
			}
			return dialer.DialContext(ctx, network, address)
		},
		TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		MaxIdleConns:          100,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
	}}
}

func targetURL(r *http.Request) (*url.URL, error) {
	said := map[string]string{}
	for _, name := range []string{"Proto", "Namespace", "Service", "Port"} {
		values := r.Header.Values("Cluster-Proxy-" + name)
		if len(values) != 1 || values[0] == "" {
			return nil, fmt.Errorf("invalid request headers: Cluster-Proxy-%s is %q", name, values)
		}
		said[name] = values[0]
	}
	if strings.ToLower(said["Service"]) == "kubernetes" && strings.ToLower(said["Namespace"]) == "default" {
		return &url.URL{Scheme: "https", Host: "kubernetes.default.svc"}, nil
	}
	return url.Parse(fmt.Sprintf("%s://%s.%s.svc:%s", said["Proto"], said["Service"], said["Namespace"], said["Port"]))
}

func (s *serviceProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to, err := targetURL(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.Transport = s.transport
	proxy.ServeHTTP(w, r)
}
