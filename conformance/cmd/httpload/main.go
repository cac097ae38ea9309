// Command httpload asks for a URL over and over, and reports as JSON how often and how fast it was answered. It comes
// there directly, or with a single-use tunnel of the released Go client for each request, as the original's user server does.
// As "httpload serve" it is the service that is asked.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	konnectivity "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// A load is what is asked, and by which way.
type load struct {
	url    string
	header http.Header
	tls    *tls.Config
	http2  bool

	// Of a single-use tunnel for each request; empty: none.
	proxy    string
	proxyTLS *tls.Config
}

type headers http.Header

func (h headers) String() string { return "" }

func (h headers) Set(line string) error {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("want NAME: VALUE")
	}
	http.Header(h).Add(name, strings.TrimSpace(value))
	return nil
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		serve(os.Args[2:])
		return
	}
	header := http.Header{}
	url := flag.String("url", "", "what to ask for")
	flag.Var(headers(header), "header", "NAME: VALUE, in each request")
	ca := flag.String("ca", "", "PEM file of the CA of whom it asks")
	http2 := flag.Bool("http2", false, "HTTP/2 instead of HTTP/1.1")
	mode := flag.String("mode", "rate", "rate: as many as can be; open: so many per second, whatever the answers; stream; events; hold")
	parallel := flag.Int("parallel", 16, "rate: requests at once; hold: clients, which share the requests")
	rate := flag.Float64("rate", 50, "open: requests per second")
	count := flag.Int("count", 2000, "hold: requests that stay open until stdin ends")
	duration := flag.Duration("duration", 2*time.Second, "how long it is measured")
	warmup := flag.Duration("warmup", 500*time.Millisecond, "how long before that it goes on unmeasured")
	proxy := flag.String("proxy", "", "HOST:PORT of the proxy server's gRPC frontend: a tunnel for each request")
	proxyCA := flag.String("proxy-ca", "", "PEM file of its CA")
	proxyCert := flag.String("proxy-cert", "", "PEM file of the certificate for it")
	proxyKey := flag.String("proxy-key", "", "PEM file of its key")
	flag.Parse()

	l := &load{url: *url, header: header, tls: tlsConfig(*ca, "", ""), http2: *http2, proxy: *proxy}
	if *proxy != "" {
		l.proxyTLS = tlsConfig(*proxyCA, *proxyCert, *proxyKey)
		host, _, err := net.SplitHostPort(*proxy)
		check(err)
		l.proxyTLS.ServerName = host
	}
	r := newResult()
	switch *mode {
	case "rate":
		l.rate(r, *parallel, *warmup, *duration)
	case "open":
		l.open(r, *rate, *warmup, *duration)
	case "stream":
		l.stream(r, *warmup, *duration)
	case "events":
		l.events(r, *warmup, *duration)
	case "hold":
		l.hold(r, *parallel, *count)
		return
	default:
		log.Fatalf("no mode %q", *mode)
	}
	check(json.NewEncoder(os.Stdout).Encode(r.report(*duration)))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func tlsConfig(ca, cert, key string) *tls.Config {
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	pem, err := os.ReadFile(ca)
	check(err)
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		log.Fatalf("no certificate in %s", ca)
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		check(err)
		config.Certificates = []tls.Certificate{pair}
	}
	return config
}

// client returns one with connections of its own.
func (l *load) client() *http.Client {
	transport := &http.Transport{
		TLSClientConfig: l.tls.Clone(), MaxIdleConns: 1000, MaxIdleConnsPerHost: 1000, ForceAttemptHTTP2: l.http2,
		DisableCompression: true,
	}
	return &http.Client{Transport: transport}
}

// get asks once; close ends what the answer came by, after its body was read.
func (l *load) get(ctx context.Context, client *http.Client) (answer *http.Response, close func(), err error) {
	close = func() {}
	if l.proxy != "" {
		ctx, cancel := context.WithCancel(ctx)
		tunnel, err := konnectivity.CreateSingleUseGrpcTunnel(ctx, l.proxy, grpc.WithTransportCredentials(credentials.NewTLS(l.proxyTLS)))
		if err != nil {
			cancel()
			return nil, nil, err
		}
		transport := &http.Transport{TLSClientConfig: l.tls.Clone(), DialContext: tunnel.DialContext, DisableCompression: true}
		client = &http.Client{Transport: transport}
		close = func() {
			transport.CloseIdleConnections()
			cancel()
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, l.url, nil)
	check(err)
	request.Header = l.header
	answer, err = client.Do(request)
	if err == nil && answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 200))
		answer.Body.Close()
		err = fmt.Errorf("%s: %s", answer.Status, text)
	}
	if err != nil {
		close()
		return nil, nil, err
	}
	return answer, close, nil
}

// once asks and reads the whole answer.
func (l *load) once(client *http.Client) error {
	answer, close, err := l.get(context.Background(), client)
	if err != nil {
		return err
	}
	defer close()
	_, err = io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	return err
}

// -- what is measured ----------------------------------------------------------------------------------

func (l *load) rate(r *result, parallel int, warmup, duration time.Duration) {
	begin := time.Now().Add(warmup)
	end := begin.Add(duration)
	var workers sync.WaitGroup
	for range parallel {
		workers.Go(func() {
			client := l.client()
			for {
				start := time.Now()
				if start.After(end) {
					return
				}
				err := l.once(client)
				now := time.Now()
				// Counted where it ends.
				if now.After(begin) && now.Before(end) {
					r.add(now.Sub(start), err)
				}
			}
		})
	}
	workers.Wait()
}

func (l *load) open(r *result, rate float64, warmup, duration time.Duration) {
	client := l.client()
	begin := time.Now()
	var asked sync.WaitGroup
	for number := 0; ; number++ {
		due := time.Duration(float64(number) / rate * float64(time.Second))
		if due > warmup+duration {
			break
		}
		at := begin.Add(due)
		time.Sleep(time.Until(at))
		asked.Go(func() {
			err := l.once(client)
			if due >= warmup {
				// From when it was due, so that waiting behind others counts.
				r.add(time.Since(at), err)
			}
		})
	}
	asked.Wait()
}

func (l *load) stream(r *result, warmup, duration time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	answer, close, err := l.get(ctx, l.client())
	check(err)
	defer close()
	buffer := make([]byte, 256<<10)
	begin := time.Now().Add(warmup)
	for {
		n, err := answer.Body.Read(buffer)
		check(err)
		r.all += n
		now := time.Now()
		if now.After(begin.Add(duration)) {
			return
		}
		if now.After(begin) {
			r.bytes += n
		}
	}
}

func (l *load) events(r *result, warmup, duration time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	answer, close, err := l.get(ctx, l.client())
	check(err)
	defer close()
	lines := bufio.NewScanner(answer.Body)
	begin := time.Now().Add(warmup)
	for lines.Scan() {
		now := time.Now()
		sent, err := strconv.ParseInt(lines.Text(), 10, 64)
		check(err)
		if now.After(begin.Add(duration)) {
			return
		}
		if now.After(begin) {
			r.add(now.Sub(time.Unix(0, sent)), nil)
		}
	}
	log.Fatal("the events have ended: ", lines.Err())
}

func (l *load) hold(r *result, parallel, count int) {
	clients := make([]*http.Client, parallel)
	for number := range clients {
		clients[number] = l.client()
	}
	slots := make(chan struct{}, 50)
	var opened sync.WaitGroup
	for number := range count {
		slots <- struct{}{}
		opened.Go(func() {
			defer func() { <-slots }()
			start := time.Now()
			answer, _, err := l.get(context.Background(), clients[number%parallel])
			if err == nil {
				// The first line; then there is silence.
				_, err = bufio.NewReaderSize(answer.Body, 16).ReadString('\n')
			}
			r.add(time.Since(start), err)
		})
	}
	opened.Wait()
	check(json.NewEncoder(os.Stdout).Encode(r.report(time.Second)))
	io.Copy(io.Discard, os.Stdin)
}

// -- figures -------------------------------------------------------------------------------------------

type result struct {
	mu     sync.Mutex
	took   []time.Duration
	errors map[string]int
	bytes  int
	all    int
}

type report struct {
	Requests int                `json:"requests"`
	PerS     float64            `json:"per_s"`
	MbitS    float64            `json:"mbit_s"`
	GiB      float64            `json:"gib"` // with those of the warm-up
	US       map[string]float64 `json:"us,omitempty"`
	Errors   map[string]int     `json:"errors"`
}

func newResult() *result { return &result{errors: map[string]int{}} }

func (r *result) add(took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.errors[err.Error()]++
		return
	}
	r.took = append(r.took, took)
}

func (r *result) report(duration time.Duration) report {
	out := report{
		Requests: len(r.took), PerS: float64(len(r.took)) / duration.Seconds(),
		MbitS: float64(r.bytes) * 8 / 1e6 / duration.Seconds(), GiB: float64(r.all) / (1 << 30), Errors: r.errors,
	}
	if len(r.took) > 0 {
		slices.Sort(r.took)
		out.US = map[string]float64{}
		for name, share := range map[string]float64{"p50": 0.5, "p99": 0.99, "max": 1} {
			at := min(int(share*float64(len(r.took))), len(r.took)-1)
			out.US[name] = float64(r.took[at].Nanoseconds()) / 1000
		}
	}
	return out
}

// -- what is asked -------------------------------------------------------------------------------------

func serve(arguments []string) {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	listen := flags.String("listen", "", "HOST:PORT, HTTPS")
	cert := flags.String("cert", "", "PEM file of the certificate")
	key := flags.String("key", "", "PEM file of its key")
	every := flags.Duration("every", 20*time.Millisecond, "how often an event comes")
	check(flags.Parse(arguments))
	kib := []byte(strings.Repeat("x", 1<<10))
	large := []byte(strings.Repeat("x", 32<<10))
	mux := http.NewServeMux()
	mux.HandleFunc("/1k", func(w http.ResponseWriter, _ *http.Request) { w.Write(kib) })
	mux.HandleFunc("/stream", func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(large); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		for ticks := time.NewTicker(*every); r.Context().Err() == nil; <-ticks.C {
			fmt.Fprintln(w, time.Now().UnixNano())
			w.(http.Flusher).Flush()
		}
	})
	mux.HandleFunc("/watch", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "first")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.Handle("/echo", websocket.Handler(func(c *websocket.Conn) { io.Copy(c, c) }))
	server := &http.Server{Addr: *listen, Handler: mux}
	log.Fatal(server.ListenAndServeTLS(*cert, *key))
}
