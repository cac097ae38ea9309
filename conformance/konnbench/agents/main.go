// Command agents plays many clusters at once: upstream's own agent client,
// -count times in this one process, each with an agent ID and a gRPC
// connection over mutual TLS of its own.
//
//	agents -server 127.0.0.1:8091 -count 300 -ca ca.crt -cert agent.crt -key agent.key
//
// It prints one JSON line once all of them are connected. SIGTERM or SIGINT
// ends it.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"sigs.k8s.io/apiserver-network-proxy/pkg/agent"
	"sigs.k8s.io/apiserver-network-proxy/pkg/util"
)

func main() {
	server := flag.String("server", "", "proxy server's HOST:PORT for agents")
	count := flag.Int("count", 1, "agents to play")
	ca := flag.String("ca", "", "CA certificate file")
	cert := flag.String("cert", "", "agent certificate file")
	key := flag.String("key", "", "agent key file")
	identifiers := flag.String("identifiers", "", "identifiers of each agent; %d is its number, from 1")
	limit := flag.Duration("timeout", 60*time.Second, "limit for all to connect")
	flag.Parse()

	host, _, err := net.SplitHostPort(*server)
	if err != nil {
		fatal(err)
	}
	config, err := util.GetClientTLSConfig(*ca, *cert, *key, host, nil)
	if err != nil {
		fatal(err)
	}
	stop := make(chan struct{})
	sets := make([]*agent.ClientSet, *count)
	begin := time.Now()
	for i := range sets {
		// The defaults of upstream's agent program.
		options := agent.ClientSetConfig{
			Address:          *server,
			AgentID:          fmt.Sprintf("bench-%d", i),
			AgentIdentifiers: strings.ReplaceAll(*identifiers, "%d", strconv.Itoa(i+1)),
			SyncInterval:     time.Second,
			ProbeInterval:    time.Second,
			SyncIntervalCap:  10 * time.Second,
			XfrChannelSize:   150,
			DialOptions: []grpc.DialOption{
				grpc.WithTransportCredentials(credentials.NewTLS(config)),
				grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Hour, PermitWithoutStream: true}),
			},
		}
		sets[i] = options.NewAgentClientSet(make(chan struct{}), stop)
		sets[i].SetServerCounter(agent.NewAggregateServerCounter(nil, agent.NewResponseBasedCounter(sets[i]), "default"))
		sets[i].Serve()
	}
	for connected := 0; connected < *count; {
		if time.Since(begin) > *limit {
			fatal(fmt.Errorf("only %d of %d agents are connected after %s", connected, *count, *limit))
		}
		time.Sleep(20 * time.Millisecond)
		connected = 0
		for _, set := range sets {
			if set.HealthyClientsCount() > 0 {
				connected++
			}
		}
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"agents": *count, "seconds": time.Since(begin).Seconds(), "pid": os.Getpid()})

	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, os.Interrupt)
	<-ended
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "agents:", err)
	os.Exit(1)
}
