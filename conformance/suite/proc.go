package suite

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Proc is a program under test. It is killed, by its process id, when the row
// ends, and by the kernel if the suite itself is killed.
type Proc struct {
	Name string
	cmd  *exec.Cmd
	log  string
	Done chan struct{}

	mu       sync.Mutex
	expected bool // we ended it, or await its end
}

func (t *T) startProc(name string, argv []string, env []string) (*Proc, error) {
	t.mu.Lock()
	n := len(t.procs)
	t.mu.Unlock()
	p := &Proc{Name: name, Done: make(chan struct{}), log: filepath.Join(t.dir, fmt.Sprintf("%d-%s.log", n, name))}
	out, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	fmt.Fprintf(out, "# %s\n", strings.Join(argv, " "))
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := spawn(p.cmd); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait()
		close(p.Done)
	}()
	t.mu.Lock()
	t.procs = append(t.procs, p)
	t.mu.Unlock()
	t.Cleanup(p.Kill)
	return p, nil
}

// spawn starts processes from one locked thread that lives as long as the
// suite: Pdeathsig looks at the death of the thread that forked.
func spawn(cmd *exec.Cmd) error {
	spawner.once.Do(func() {
		spawner.work = make(chan func())
		go spawnLoop()
	})
	done := make(chan error)
	spawner.work <- func() { done <- cmd.Start() }
	return <-done
}

// Expect says that the process may end from now on.
func (p *Proc) Expect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expected = true
}

// Kill ends the process at once and waits for it.
func (p *Proc) Kill() {
	p.Expect()
	p.cmd.Process.Kill()
	<-p.Done
}

// Signal sends a signal.
func (p *Proc) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Alive tells whether the process is still running.
func (p *Proc) Alive() bool {
	select {
	case <-p.Done:
		return false
	default:
		return true
	}
}

// ExitCode is that of an ended process, -1 if it was killed by a signal.
func (p *Proc) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// Log is what the program has written so far.
func (p *Proc) Log() string {
	text, _ := os.ReadFile(p.log)
	_, text2, _ := strings.Cut(string(text), "\n")
	return text2
}

func (p *Proc) logTail() string {
	lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
	return strings.Join(lines[max(0, len(lines)-8):], "\n")
}

func (p *Proc) unexpectedEnd() (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.expected || p.Alive() {
		return "", false
	}
	text := p.Log()
	if i := strings.Index(text, "panic:"); i >= 0 {
		text = text[i:]
	} else if i := strings.LastIndex(strings.TrimSpace(text), "\n"); i >= 0 {
		text = text[i:]
	}
	return fmt.Sprintf("%s ended by itself with %v: %s", p.Name, p.cmd.ProcessState, oneLine(text, 200)), true
}

var ports struct {
	mu   sync.Mutex
	next int
}

// Those around them are of the tests in Python, which may run at the same time.
const firstPort, lastPort = 21000, 26999

// freePort hands out ports below the ephemeral range, each one once in turn,
// so that none is used again soon.
func freePort() int {
	ports.mu.Lock()
	defer ports.mu.Unlock()
	if ports.next == 0 {
		// Two suites at once should not meet at the same numbers.
		ports.next = firstPort + os.Getpid()%40*150
	}
	for range lastPort - firstPort {
		port := ports.next
		if ports.next++; ports.next > lastPort {
			ports.next = firstPort
		}
		if isFree(port) {
			return port
		}
	}
	panic("no free port")
}

// isFree binds and does not listen: a process that is being started at this
// moment holds our sockets until its exec, and a listening one would keep the
// port from whoever gets it.
func isFree(port int) bool {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	if syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) != nil {
		return false
	}
	return syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}) == nil
}

func waitClosed(ch <-chan struct{}, limit time.Duration) bool {
	select {
	case <-ch:
		return true
	case <-time.After(limit):
		return false
	}
}
