// Command democlient makes one HTTP request through a konnectivity proxy server with the released Go client
// (sigs.k8s.io/apiserver-network-proxy/konnectivity-client): gRPC over mutual TLS, a single-use tunnel.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

func main() {
	proxy := flag.String("proxy", "127.0.0.1:8090", "host:port of the proxy server's gRPC frontend")
	ca := flag.String("ca", "", "PEM file of the CA that signed the proxy server's certificate")
	cert := flag.String("cert", "", "PEM file of the client's certificate")
	key := flag.String("key", "", "PEM file of the client's key")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: democlient -proxy HOST:PORT -ca FILE -cert FILE -key FILE URL")
		os.Exit(2)
	}
	if err := get(*proxy, *ca, *cert, *key, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "democlient:", err)
		os.Exit(1)
	}
}

func get(proxy, caFile, certFile, keyFile, url string) error {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("no certificate in %s", caFile)
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(proxy)
	if err != nil {
		return err
	}
	config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: host}

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// A single-use tunnel carries one connection and ends with it; CreateGRPCTunnel makes one that carries many.
	tunnel, err := client.CreateSingleUseGrpcTunnelWithContext(
		ctx, ctx, proxy, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return err
	}
	httpClient := &http.Client{Transport: &http.Transport{DialContext: tunnel.DialContext}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Close = true
	response, err := httpClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}
