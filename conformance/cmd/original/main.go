// Command original plays the two HTTP programs of the original Cluster Proxy, as far as requests go, beside ours: what
// an old hub sends to a new service proxy, and what an old service proxy reads of a new hub's requests. The original is
// no Go module that others could build; the rules here are those of its pkg/userserver, pkg/serviceproxy and pkg/utils.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	listen := flag.String("listen", "", "HOST:PORT of the HTTPS listener")
	cert := flag.String("cert", "", "PEM file of its certificate")
	key := flag.String("key", "", "PEM file of its key")
	ca := flag.String("ca", "", "PEM file of the CAs of whom it connects to")

	proxy := flag.String("proxy", "", "user-server: host:port of the proxy server's gRPC frontend")
	proxyCA := flag.String("proxy-ca", "", "user-server: PEM file of the proxy server's CA")
	proxyCert := flag.String("proxy-cert", "", "user-server: PEM file of the certificate for the proxy server")
	proxyKey := flag.String("proxy-key", "", "user-server: PEM file of its key")

	apiserver := flag.String("apiserver", "", "service-proxy: host:port where kubernetes.default.svc:443 is dialled")
	flag.Parse()

	roots, err := pool(*ca)
	if err != nil {
		log.Fatal(err)
	}
	var handler http.Handler
	switch flag.Arg(0) {
	case "user-server":
		handler, err = newUserServer(*proxy, *proxyCA, *proxyCert, *proxyKey, roots)
	case "service-proxy":
		handler = newServiceProxy(*apiserver, roots)
	default:
		err = fmt.Errorf("usage: original -listen HOST:PORT -cert FILE -key FILE ... user-server|service-proxy")
	}
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{
		Addr: *listen, Handler: handler, ReadHeaderTimeout: 32 * time.Second,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12},
	}
	log.Fatal(server.ListenAndServeTLS(*cert, *key))
}

func pool(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s", file)
	}
	return roots, nil
}
