// Command httppeer is Go's net/http as the peers of a reverse proxy: an origin that tells what it saw, Go's own
// ReverseProxy in front of it to be compared with, and a client. tests/reverse_proxy/test_go_peers.py runs it.
package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
)

type seen struct {
	Method, URI, Host, Proto string
	Header, Trailer          http.Header
	Encoding                 []string
	Length, Read             int64
}

func echo(w http.ResponseWriter, r *http.Request) {
	read, _ := io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(seen{
		r.Method, r.RequestURI, r.Host, r.Proto, r.Header, r.Trailer, r.TransferEncoding, r.ContentLength, read,
	})
}

func origin() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", echo)
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprint(w, "hello")
		w.Header().Set("X-Sum", "1")
		w.Header().Set(http.TrailerPrefix+"X-Late", "2")
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</a>")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, "hello")
	})
	mux.HandleFunc("/refuse", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no body wanted", http.StatusForbidden)
	})
	mux.HandleFunc("/empty", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/same", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) })
	mux.HandleFunc("/hop", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "X-Mine")
		w.Header().Set("X-Mine", "1")
		w.Header().Set("Keep-Alive", "timeout=5")
		w.Header().Set("Upgrade", "h2c")
		fmt.Fprint(w, "hello")
	})
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\nhello ",
			r.Header.Get("Upgrade"))
		_, _ = io.Copy(conn, buffered)
	})
	return mux
}

func listen(handler http.Handler) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go func() { log.Fatal(http.Serve(listener, handler)) }()
	return listener.Addr().String()
}

// ask makes a POST with trailers and prints what came of it.
func ask(client *http.Client, target string) {
	reader, writer := io.Pipe()
	request, err := http.NewRequest(http.MethodPost, target, reader)
	if err != nil {
		log.Fatal(err)
	}
	request.Trailer = http.Header{"X-Sum": nil}
	go func() {
		fmt.Fprint(writer, strings.Repeat("x", 200_000))
		request.Trailer.Set("X-Sum", "7")
		writer.Close()
	}()
	answer := map[string]any{}
	if response, err := client.Do(request); err != nil {
		answer["error"] = err.Error()
	} else {
		body, err := io.ReadAll(response.Body)
		answer["status"], answer["proto"], answer["body"] = response.StatusCode, response.Proto, string(body)
		answer["trailer"] = response.Trailer
		if err != nil {
			answer["error"] = err.Error()
		}
		response.Body.Close()
	}
	_ = json.NewEncoder(os.Stdout).Encode(answer)
}

func main() {
	// ReverseProxy logs what it is asked to complain about.
	log.SetOutput(io.Discard)
	address := listen(origin())
	proxy := &httputil.ReverseProxy{Director: func(r *http.Request) {
		r.URL = &url.URL{Scheme: "http", Host: address, Opaque: r.URL.Opaque, Path: r.URL.Path, RawPath: r.URL.RawPath,
			RawQuery: r.URL.RawQuery}
	}, Transport: &http.Transport{DisableCompression: true}}
	fmt.Println(address, listen(proxy))
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableCompression: true,
	}}
	// Each line is an URL to ask; the end of them is ours.
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		ask(client, lines.Text())
	}
}
