package suite

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// The programs that go.mod names as tools, by the name of the built file.
var tools = map[string]string{
	"server":         "sigs.k8s.io/apiserver-network-proxy/cmd/server",
	"agent":          "sigs.k8s.io/apiserver-network-proxy/cmd/agent",
	"h2spec":         "github.com/summerwind/h2spec/cmd/h2spec",
	"interop-client": "google.golang.org/grpc/interop/client",
}

// ModuleRoot is the folder of this module's go.mod.
func ModuleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	file := strings.TrimSpace(string(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("run this inside the conformance module")
	}
	return filepath.Dir(file), nil
}

func cacheRoot() (string, error) {
	if dir := os.Getenv("CLUSTERPROXY_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "clusterproxy"), nil
}

// Tool returns the path of a built tool, building it if this go.mod, go.sum
// and Go version have not built it before.
func Tool(name string) (string, error) {
	pkg, ok := tools[name]
	if !ok {
		return "", fmt.Errorf("unknown tool %q", name)
	}
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	return buildCached(root, "go.mod", name, pkg)
}

// buildCached builds a package of the module in folder dir as modFile pins it,
// if these sources and this Go version have not built it before.
func buildCached(dir, modFile, name, pkg string, sources ...string) (string, error) {
	sum := sha256.New()
	for _, f := range append([]string{modFile, strings.TrimSuffix(modFile, ".mod") + ".sum"}, sources...) {
		text, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			return "", err
		}
		sum.Write(text)
	}
	sum.Write([]byte(runtime.Version() + runtime.GOARCH))
	cache, err := cacheRoot()
	if err != nil {
		return "", err
	}
	folder := filepath.Join(cache, "go-tools-"+hex.EncodeToString(sum.Sum(nil))[:16])
	return build(dir, modFile, folder, name, pkg)
}

// build runs one go build at a time, however many of us are running.
func build(root, modFile, dir, name, pkg string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(dir, name)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	lock, err := os.Create(filepath.Join(filepath.Dir(dir), "build.lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	fmt.Fprintf(os.Stderr, "building %s (a cold build takes a few minutes)\n", pkg)
	part := fmt.Sprintf("%s.%d", file, os.Getpid())
	cmd := exec.Command("go", "build", "-trimpath", "-modfile="+modFile, "-o", part, pkg)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return file, os.Rename(part, file)
}

// buildOwn builds a program of this module; its sources may have changed, so
// nothing but Go's own build cache is trusted.
func buildOwn(dir, pkg string) (string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", file, pkg)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return file, nil
}
