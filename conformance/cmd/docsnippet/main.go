// Command docsnippet is the Go example of Cluster Proxy's documentation ("Usage"), as a whole program: it asks a
// cluster's API server for its version through the proxy server, and for the pods of a namespace if one is named.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc"
	grpccredentials "google.golang.org/grpc/credentials"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	konnectivity "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// snippet is the documentation's text but for proxyService, which is a placeholder there, and what is done with cfg.
func snippet(proxyService string, proxyTLSCfg *tls.Config, kubeconfig, clusterName, namespace string) error {
	tunnel, err := konnectivity.CreateSingleUseGrpcTunnel(
		context.TODO(),
		proxyService,
		grpc.WithTransportCredentials(grpccredentials.NewTLS(proxyTLSCfg)),
	)
	if err != nil {
		return err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	cfg.Host = clusterName
	cfg.Dial = tunnel.DialContext

	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	version, err := client.Discovery().ServerVersion()
	if err != nil {
		return err
	}
	fmt.Println(version)
	if namespace == "" {
		return nil
	}
	pods, err := client.CoreV1().Pods(namespace).List(context.TODO(), metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, pod := range pods.Items {
		fmt.Println(pod.Name)
	}
	return nil
}

func main() {
	proxy := flag.String("proxy", "127.0.0.1:8090", "host:port of the proxy server's gRPC frontend")
	ca := flag.String("ca", "", "PEM file of the CA that signed the proxy server's certificate")
	cert := flag.String("cert", "", "PEM file of the client's certificate")
	key := flag.String("key", "", "PEM file of the client's key")
	kubeconfig := flag.String("kubeconfig", "", "file with the cluster's CA and a user's credentials")
	cluster := flag.String("cluster", "", "the cluster's name, under which its agent reaches the API server")
	namespace := flag.String("pods", "", "a namespace whose pods to list, too")
	flag.Parse()
	config, err := proxyTLS(*proxy, *ca, *cert, *key)
	if err == nil {
		err = snippet(*proxy, config, *kubeconfig, *cluster, *namespace)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "docsnippet:", err)
		os.Exit(1)
	}
}

func proxyTLS(proxy, caFile, certFile, keyFile string) (*tls.Config, error) {
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
	host, _, err := net.SplitHostPort(proxy)
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: host}, nil
}
