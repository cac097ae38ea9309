package suite

import (
	"flag"
	"io"

	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// The stock client logs what rows provoke on purpose.
func init() {
	fs := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(fs)
	fs.Set("logtostderr", "false")
	fs.Set("alsologtostderr", "false")
	fs.Set("stderrthreshold", "FATAL")
	klog.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
}
