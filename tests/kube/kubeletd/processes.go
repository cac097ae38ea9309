package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/creack/pty"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// processes is a container runtime whose containers are processes of this machine.
type processes struct{ pods *pods }

// Exec runs a command beside a container's process, in its folder and with its variables.
func (p *processes) Exec(
	ctx context.Context, id string, words []string, in io.Reader, out, stderr io.WriteCloser, tty bool,
	resize <-chan remotecommand.TerminalSize,
) error {
	container, ctx, cancel, err := p.pods.running(ctx, id)
	if err != nil {
		return err
	}
	defer cancel()
	command, err := container.beside(words)
	if err != nil {
		return err
	}
	start := startPiped
	if tty {
		start = startOnTerminal
	}
	wait, err := start(command, in, out, stderr, resize)
	if err != nil {
		return fmt.Errorf("unable to start container process: %w", err)
	}
	// Nothing of a container outlives it.
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-command.Process.Pid, syscall.SIGKILL) })
	defer stop()
	return exitOf(wait())
}

func (c *container) beside(words []string) (*exec.Cmd, error) {
	if len(words) == 0 {
		return nil, errors.New("no command")
	}
	line := append([]string{}, c.Command...)
	if program, known := c.Programs[words[0]]; known {
		line = append(line, program...)
		words = words[1:]
	} else if err := c.find(words[0]); err != nil {
		return nil, err
	}
	for _, word := range words {
		line = append(line, c.moved(word))
	}
	command := exec.Command(line[0], line[1:]...)
	command.Dir = c.Folder
	command.Env = c.Environment
	return command, nil
}

// find fails as a runtime does if there is no such command; what is put before it would do so in its own way.
func (c *container) find(word string) error {
	word = c.moved(word)
	if strings.Contains(word, "/") && !filepath.IsAbs(word) {
		word = filepath.Join(c.Folder, word)
	}
	_, err := exec.LookPath(word)
	return err
}

// moved returns a word with the paths of mounts replaced by those of their folders, as process_kubelet.py does.
func (c *container) moved(word string) string {
	for _, mount := range c.Mounts {
		path := regexp.MustCompile(`(^|[^\w./-])` + regexp.QuoteMeta(mount[0]) + `(/|$|[^\w.-])`)
		word = path.ReplaceAllString(word, "${1}"+strings.ReplaceAll(mount[1], "$", "$$")+"${2}")
	}
	return word
}

func startPiped(
	command *exec.Cmd, in io.Reader, out, stderr io.WriteCloser, _ <-chan remotecommand.TerminalSize,
) (func() error, error) {
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if out != nil {
		command.Stdout = out
	}
	if stderr != nil {
		command.Stderr = stderr
	}
	if in != nil {
		// Not as command.Stdin: for what reads that would be waited.
		stdin, err := command.StdinPipe()
		if err != nil {
			return nil, err
		}
		go func() {
			_, _ = io.Copy(stdin, in)
			_ = stdin.Close()
		}()
	}
	return command.Wait, command.Start()
}

func startOnTerminal(
	command *exec.Cmd, in io.Reader, out, _ io.WriteCloser, resize <-chan remotecommand.TerminalSize,
) (func() error, error) {
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	terminal, err := pty.Start(command)
	if err != nil {
		return nil, err
	}
	go func() {
		for size := range resize {
			_ = pty.Setsize(terminal, &pty.Winsize{Rows: size.Height, Cols: size.Width})
		}
	}()
	if in != nil {
		go func() { _, _ = io.Copy(terminal, in) }()
	}
	return func() error {
		defer terminal.Close()
		if out != nil {
			// Ends with an error when the last process has closed the terminal.
			_, _ = io.Copy(out, terminal)
		}
		return command.Wait()
	}, nil
}

func exitOf(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	code := exit.ExitCode()
	if status := exit.Sys().(syscall.WaitStatus); status.Signaled() {
		code = 128 + int(status.Signal())
	}
	return utilexec.CodeExitError{Err: err, Code: code}
}

// Attach shows what a container writes from now on, and writes to its stdin if it has one.
func (p *processes) Attach(
	ctx context.Context, id string, in io.Reader, out, _ io.WriteCloser, tty bool, _ <-chan remotecommand.TerminalSize,
) error {
	container, ctx, cancel, err := p.pods.running(ctx, id)
	if err != nil {
		return err
	}
	defer cancel()
	if tty {
		return errors.New("no container has a terminal here")
	}
	output, err := os.Open(container.Log)
	if err != nil {
		return err
	}
	defer output.Close()
	if _, err := output.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	if in != nil {
		if container.Stdin == "" {
			return fmt.Errorf("container %s has no stdin", id)
		}
		stdin, err := os.OpenFile(container.Stdin, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		go func() {
			defer stdin.Close()
			_, _ = io.Copy(stdin, in)
		}()
	}
	if out == nil {
		<-ctx.Done()
		return nil
	}
	return follow(ctx, output, out)
}

// PortForward connects a stream with a port of the pod.
func (p *processes) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	pod, ctx, cancel, err := p.pods.present(ctx, id)
	if err != nil {
		return err
	}
	defer cancel()
	address := net.JoinHostPort(pod.Address, strconv.Itoa(int(port)))
	connected, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("failed to connect to port %d of pod %s: %w", port, id, err)
	}
	connection := connected.(*net.TCPConn)
	defer connection.Close()
	stop := context.AfterFunc(ctx, func() {
		_ = connection.Close()
		_ = stream.Close()
	})
	defer stop()
	go func() {
		_, _ = io.Copy(connection, stream)
		_ = connection.CloseWrite()
	}()
	_, err = io.Copy(stream, connection)
	return err
}
