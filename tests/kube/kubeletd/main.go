// Command kubeletd is the part of a kubelet that an apiserver calls: logs, exec, attach and port-forward of pods.
//
// The protocols are Kubernetes' own: what a kubelet does with a request (k8s.io/kubernetes/pkg/kubelet/server/server.go)
// is done here with the same packages, and k8s.io/cri-streaming serves the streams as a container runtime does. The pods
// are what tests/kube/process_kubelet.py runs as processes: it keeps a file about each in the folder -pods.
//
// It says its port in a line on stdout and ends with its stdin.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"

	"k8s.io/apimachinery/pkg/util/httpstream/wsstream"
	"k8s.io/apimachinery/pkg/util/proxy"
	translator "k8s.io/apiserver/pkg/util/proxy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

func main() {
	address := flag.String("address", "127.0.0.1:0", "where it listens")
	folder := flag.String("pods", "", "the folder with a file for each pod")
	certificate := flag.String("cert", "", "its certificate")
	key := flag.String("key", "", "the certificate's key")
	ca := flag.String("client-ca", "", "who signs the certificates of those who may call: all of them may do all")
	flag.Parse()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if err := run(*address, *folder, *certificate, *key, *ca); err != nil {
		log.Fatal(err)
	}
}

func run(address, folder, certificate, key, ca string) error {
	pods, err := watchPods(folder)
	if err != nil {
		return err
	}
	streams, err := startStreaming(pods)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(pem) {
		return errors.New("no certificate in " + ca)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	server := &http.Server{
		Handler:   (&kubelet{pods, streams}).routes(),
		TLSConfig: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients},
	}
	return server.ServeTLS(listener, certificate, key)
}

// startStreaming serves the streams on a port of its own, as container runtimes do.
func startStreaming(pods *pods) (streaming.Server, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	config := streaming.DefaultConfig
	config.Addr = listener.Addr().String()
	config.BaseURL = &url.URL{Scheme: "http", Host: config.Addr, Path: "/cri/"}
	server, err := streaming.NewServer(config, &processes{pods})
	if err != nil {
		return nil, err
	}
	go func() { log.Fatal(http.Serve(listener, server)) }()
	return server, nil
}

type kubelet struct {
	pods    *pods
	streams streaming.Server
}

func (k *kubelet) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) })
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", k.pods.serveLogs)
	mux.HandleFunc("/exec/{namespace}/{pod}/{container}", k.serveExec)
	mux.HandleFunc("/attach/{namespace}/{pod}/{container}", k.serveAttach)
	mux.HandleFunc("/portForward/{namespace}/{pod}", k.servePortForward)
	return mux
}

func (k *kubelet) serveExec(w http.ResponseWriter, r *http.Request) {
	k.serveCommand(w, r, func(container string, o *remotecommand.Options) (string, error) {
		answer, err := k.streams.GetExec(&runtimeapi.ExecRequest{
			ContainerId: container, Cmd: r.Form["command"], Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY,
		})
		return answer.GetUrl(), err
	})
}

func (k *kubelet) serveAttach(w http.ResponseWriter, r *http.Request) {
	k.serveCommand(w, r, func(container string, o *remotecommand.Options) (string, error) {
		answer, err := k.streams.GetAttach(&runtimeapi.AttachRequest{
			ContainerId: container, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY,
		})
		return answer.GetUrl(), err
	})
}

func (k *kubelet) serveCommand(
	w http.ResponseWriter, r *http.Request, location func(container string, options *remotecommand.Options) (string, error),
) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	name := podName{r.PathValue("namespace"), r.PathValue("pod")}
	pod, err := k.pods.load(name)
	if err != nil {
		http.Error(w, "pod does not exist", http.StatusNotFound)
		return
	}
	container := pod.Containers[r.PathValue("container")]
	if container == nil || container.PID == 0 {
		http.Error(w, fmt.Sprintf("container not found (%q)", r.PathValue("container")), http.StatusInternalServerError)
		return
	}
	handler, target := upgradable(w, func() (string, error) {
		return location(name.id()+"/"+r.PathValue("container"), options)
	})
	if handler == nil {
		return
	}
	if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		handler = translator.NewStreamTranslatorHandler(target, nil, 0, translator.Options{
			Stdin: options.Stdin, Stdout: options.Stdout, Stderr: options.Stderr, Tty: options.TTY,
		})
	}
	handler.ServeHTTP(w, r)
}

func (k *kubelet) servePortForward(w http.ResponseWriter, r *http.Request) {
	tunnel := wsstream.IsWebSocketRequestWithTunnelingProtocol(r)
	options := &portforward.V4Options{}
	if !tunnel {
		var err error
		if options, err = portforward.NewV4Options(r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	name := podName{r.PathValue("namespace"), r.PathValue("pod")}
	if _, err := k.pods.load(name); err != nil {
		http.Error(w, "pod does not exist", http.StatusNotFound)
		return
	}
	handler, _ := upgradable(w, func() (string, error) {
		answer, err := k.streams.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: name.id(), Port: options.Ports})
		return answer.GetUrl(), err
	})
	if handler == nil {
		return
	}
	if tunnel {
		handler = translator.NewTunnelingHandler(handler)
	}
	handler.ServeHTTP(w, r)
}

// upgradable returns what passes a request on to the streams, or answers with the error and returns nil.
func upgradable(w http.ResponseWriter, location func() (string, error)) (http.Handler, *url.URL) {
	found, err := location()
	if err != nil {
		streaming.WriteError(err, w)
		return nil, nil
	}
	target, err := url.Parse(found)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return nil, nil
	}
	return proxy.NewUpgradeAwareHandler(target, nil, false, true, responder{}), target
}

type responder struct{}

func (responder) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusInternalServerError)
}
