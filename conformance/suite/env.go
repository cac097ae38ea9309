package suite

import (
	"os"
	"path/filepath"
)

// NewEnv builds the Go programs and makes the certificates in dir.
func NewEnv(dir string) (*Env, error) {
	env := &Env{Dir: dir}
	var err error
	if env.GoServer, err = Tool("server"); err != nil {
		return nil, err
	}
	if env.GoAgent, err = Tool("agent"); err != nil {
		return nil, err
	}
	if env.Konnbench, err = buildOwn(dir, "./konnbench"); err != nil {
		return nil, err
	}
	certs := filepath.Join(dir, "certs")
	if err := os.Mkdir(certs, 0o755); err != nil {
		return nil, err
	}
	env.Certs, err = NewCerts(certs)
	return env, err
}
