package suite

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"
)

// Says where a run is: "own" is said by RunInOwnNetwork, "host" may be said by
// whoever wants no network of its own.
const networkVariable = "CONFORMANCE_NETWORK"

// RunInOwnNetwork runs this program again in a network namespace that has
// loopback and a resolver that denies every name, and returns how that ended.
// Rows that take the programs' default ports would otherwise meet whatever else
// runs on this machine, as the pods of other tests. It returns false where it
// has to be done in place: it is the second run, or namespaces are not for us
// to make.
func RunInOwnNetwork() (done bool, err error) {
	if os.Getenv(networkVariable) != "" {
		return false, nil
	}
	self, err := os.Executable()
	if err != nil {
		return false, nil
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), networkVariable+"=own")
	// The signal is of the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return false, nil
	}
	return true, cmd.Wait()
}

// EnterNetwork makes a namespace of RunInOwnNetwork usable; dir is for its files.
func EnterNetwork(dir string) error {
	if os.Getenv(networkVariable) != "own" {
		return nil
	}
	if err := raiseLoopback(); err != nil {
		return fmt.Errorf("loopback of a new network: %w", err)
	}
	if err := denyNames(dir); err != nil {
		// Not everybody who may make namespaces may mount. Rows that need a resolver say that there is none.
		fmt.Fprintln(os.Stderr, "no resolver in the new network:", err)
	}
	return nil
}

func raiseLoopback() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	// netdevice(7): struct ifreq.
	request := struct {
		name  [16]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP | syscall.IFF_RUNNING}
	copy(request.name[:], "lo")
	if _, _, code := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); code != 0 {
		return code
	}
	return nil
}

func denyNames(dir string) error {
	server, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		return err
	}
	go func() {
		query := make([]byte, 512)
		for {
			n, from, err := server.ReadFrom(query)
			if err != nil {
				return
			}
			if n < 12 {
				continue
			}
			// RFC 1035, section 4.1.1: it is an answer, and there is no such name. The question is repeated
			// as it came, and whatever it was accompanied by (EDNS) is left out.
			answer := append([]byte(nil), query[:question(query[:n])]...)
			answer[2], answer[3] = query[2]|0x80, 0x83
			copy(answer[6:], make([]byte, 6))
			server.WriteTo(answer, from)
		}
	}()
	file := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		return err
	}
	// Nobody outside is to see it.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	return syscall.Mount(file, "/etc/resolv.conf", "", syscall.MS_BIND, "")
}

// question returns where the first question of a query ends.
func question(query []byte) int {
	at := 12
	for at < len(query) && query[at] != 0 {
		at += 1 + int(query[at])
	}
	return min(at+5, len(query))
}
