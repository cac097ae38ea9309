package suite

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// junit is the part of h2spec's report that we read.
type junit struct {
	Suites []struct {
		Name  string `xml:"name,attr"`
		ID    string `xml:"id,attr"`
		Cases []struct {
			Package string    `xml:"package,attr"`
			Class   string    `xml:"classname,attr"`
			Failure *struct{} `xml:"failure"`
			Error   *struct {
				Text string `xml:",chardata"`
			} `xml:"error"`
			Skipped *struct{} `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// RunH2spec runs h2spec in strict mode against a plain-text HTTP/2 port. Cases
// that fail must be among those of naFile, which gives the reason why each
// cannot apply; and at least minPassed cases must pass.
func RunH2spec(addr, dir, naFile string, minPassed int, w io.Writer) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	notApplicable := map[string]string{}
	if naFile != "" {
		text, err := os.ReadFile(naFile)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &notApplicable); err != nil {
			return fmt.Errorf("%s: %w", naFile, err)
		}
	}
	program, err := Tool("h2spec")
	if err != nil {
		return err
	}
	report := filepath.Join(dir, "h2spec.xml")
	out, runErr := exec.Command(program, "-h", host, "-p", port, "-S", "-o", "1", "-j", report).CombinedOutput()
	text, err := os.ReadFile(report)
	if err != nil {
		return fmt.Errorf("h2spec: %v: %s", runErr, out)
	}
	var j junit
	if err := xml.Unmarshal(text, &j); err != nil {
		return fmt.Errorf("h2spec's report: %w", err)
	}
	var passed, skipped int
	var failed, excused, stale []string
	for _, s := range j.Suites {
		for _, c := range s.Cases {
			name := c.Package + ": " + c.Class
			reason, na := notApplicable[name]
			switch {
			case c.Failure != nil || c.Error != nil:
				if na {
					excused = append(excused, name+" — "+reason)
				} else {
					failed = append(failed, name)
				}
			case c.Skipped != nil:
				skipped++
			default:
				passed++
				if na {
					stale = append(stale, name)
				}
			}
		}
	}
	fmt.Fprintf(w, "h2spec: %d passed, %d failed, %d cannot apply, %d skipped\n", passed, len(failed), len(excused), skipped)
	for _, f := range failed {
		fmt.Fprintln(w, "  failed:", f)
	}
	for _, e := range excused {
		fmt.Fprintln(w, "  cannot apply:", e)
	}
	for _, s := range stale {
		fmt.Fprintln(w, "  said not to apply, yet passed:", s)
	}
	if passed+len(failed)+len(excused) == 0 {
		return fmt.Errorf("h2spec ran no case: %s", out)
	}
	if passed < minPassed {
		return fmt.Errorf("h2spec: %d cases passed, want at least %d", passed, minPassed)
	}
	if len(failed) > 0 {
		return fmt.Errorf("h2spec: %d cases failed that are not excused", len(failed))
	}
	return nil
}

// InteropCases are grpc-go's test cases that need no credentials of a cloud.
var InteropCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response", "status_code_and_message",
	"special_status_message", "custom_metadata", "unimplemented_method", "unimplemented_service",
}

// RunInterop runs grpc-go's interop client against a plain-text port.
func RunInterop(addr string, w io.Writer) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	program, err := Tool("interop-client")
	if err != nil {
		return err
	}
	var failed []string
	for _, c := range InteropCases {
		cmd := exec.Command(program, "-server_host="+host, "-server_port="+port, "-test_case="+c, "-use_tls=false")
		done := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
		out, err := cmd.CombinedOutput()
		done.Stop()
		result := "passed"
		if err != nil {
			failed = append(failed, c)
			result = "FAILED: " + oneLine(string(out), 300)
		}
		fmt.Fprintf(w, "interop %-30s %s\n", c, result)
	}
	fmt.Fprintf(w, "interop: %d of %d cases passed\n", len(InteropCases)-len(failed), len(InteropCases))
	if len(failed) > 0 {
		return fmt.Errorf("interop: failed: %s", strings.Join(failed, ", "))
	}
	return nil
}
