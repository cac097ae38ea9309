// Command client is an older release of the Go client as a program: it listens on a port of the loopback, and each
// connection to it goes through a tunnel of its own. A connection begins with a line HOST:PORT; the answer is a line
// "ok" or the error of the dial, and from then on the bytes are the tunnel's.
//
// Each release is a .mod file of this folder.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

func main() {
	address := flag.String("server", "", "host:port of the proxy server, or the path of its Unix socket")
	ca := flag.String("ca", "", "PEM file of the CA that signed the server's certificate")
	cert := flag.String("cert", "", "PEM file of the client's certificate")
	key := flag.String("key", "", "PEM file of the client's key")
	flag.Parse()
	option := grpc.WithTransportCredentials(insecure.NewCredentials())
	extra := grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", address)
	})
	if *ca != "" {
		config, err := tlsConfig(*ca, *cert, *key)
		if err != nil {
			fatal(err)
		}
		option, extra = grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.EmptyDialOption{}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fatal(err)
	}
	fmt.Println(listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			fatal(err)
		}
		go func() {
			defer conn.Close()
			serve(conn.(*net.TCPConn), *address, option, extra)
		}()
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "client:", err)
	os.Exit(1)
}

func tlsConfig(caFile, certFile, keyFile string) (*tls.Config, error) {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s", caFile)
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "127.0.0.1"}, nil
}

func serve(local *net.TCPConn, server string, opts ...grpc.DialOption) {
	in := bufio.NewReader(local)
	target, err := in.ReadString('\n')
	if err != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	remote, done, err := dial(ctx, server, strings.TrimSpace(target), opts)
	if err != nil {
		fmt.Fprintf(local, "%v\n", err)
		return
	}
	if _, err := io.WriteString(local, "ok\n"); err != nil {
		remote.Close()
		return
	}
	go func() {
		io.CopyBuffer(writerOnly{remote}, readerOnly{in}, make([]byte, 32<<10))
		remote.Close()
	}()
	io.Copy(writerOnly{local}, remote)
	remote.Close()
	select {
	case <-done:
	case <-time.After(15 * time.Second):
	}
}

type (
	readerOnly struct{ io.Reader }
	writerOnly struct{ io.Writer }
)

func dial(ctx context.Context, server, target string, opts []grpc.DialOption) (net.Conn, <-chan struct{}, error) {
	create, stop := context.WithTimeout(ctx, 15*time.Second)
	defer stop()
	tunnel, err := client.CreateSingleUseGrpcTunnelWithContext(create, ctx, server, append(opts, grpc.WithBlock())...)
	if err != nil {
		return nil, nil, fmt.Errorf("create tunnel: %w", err)
	}
	conn, err := tunnel.DialContext(create, "tcp", target)
	if err != nil {
		return nil, nil, fmt.Errorf("dial: %w", err)
	}
	return conn, tunnel.Done(), nil
}
