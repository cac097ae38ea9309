package suite

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// NewEnv builds the Go programs and makes the certificates in dir.
func NewEnv(dir string) (*Env, error) {
	env := &Env{Dir: dir}
	var err error
	for name, command := range map[string]*[]string{"server": &env.GoServer, "agent": &env.GoAgent} {
		program, err := Tool(name)
		if err != nil {
			return nil, err
		}
		*command = []string{program}
	}
	for pkg, program := range map[string]*string{"./konnbench": &env.Konnbench, "./cmd/docsnippet": &env.Docsnippet} {
		if *program, err = buildOwn(dir, pkg); err != nil {
			return nil, err
		}
	}
	certs := filepath.Join(dir, "certs")
	if err := os.Mkdir(certs, 0o755); err != nil {
		return nil, err
	}
	env.Certs, err = NewCerts(certs)
	return env, err
}

// OurCommand splits a command line at blanks, or finds the console script.
func OurCommand(line, script string) ([]string, error) {
	if argv := strings.Fields(line); len(argv) > 0 {
		return argv, nil
	}
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(filepath.Dir(root), ".venv", "bin", script)
	if _, err := os.Stat(file); err == nil {
		return []string{file}, nil
	}
	if file, err = exec.LookPath(script); err == nil {
		return []string{file}, nil
	}
	return nil, fmt.Errorf("no %s in ../.venv/bin or the PATH: say where with -our-server and -our-agent, or choose -pairings go/go", script)
}
