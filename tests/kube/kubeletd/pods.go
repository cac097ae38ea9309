package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/fsnotify/fsnotify"
)

type podName struct{ namespace, name string }

func (n podName) id() string { return n.namespace + "/" + n.name }

// pod is the content of a pod's file.
type pod struct {
	UID        string                `json:"uid"`
	Namespace  string                `json:"namespace"`
	Address    string                `json:"address"`
	Containers map[string]*container `json:"containers"`
}

// container is what runs, and how a command is started that runs beside it.
type container struct {
	PID         int                 `json:"pid"` // 0: it does not run
	Log         string              `json:"log"`
	Stdin       string              `json:"stdin"`   // a FIFO, or nothing
	Command     []string            `json:"command"` // what comes before the words of a command
	Programs    map[string][]string `json:"programs"`
	Folder      string              `json:"folder"`
	Environment []string            `json:"environment"`
	Mounts      [][2]string         `json:"mounts"` // path in the container, folder; the longest paths first
}

// pods reads the files of a folder, and notices when they change.
type pods struct {
	folder  string
	watcher *fsnotify.Watcher
	mutex   sync.Mutex
	changed chan struct{}
}

func watchPods(folder string) (*pods, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := watcher.Add(folder); err != nil {
		return nil, err
	}
	p := &pods{folder: folder, watcher: watcher, changed: make(chan struct{})}
	go p.run()
	return p, nil
}

func (p *pods) run() {
	for range p.watcher.Events {
		p.mutex.Lock()
		close(p.changed)
		p.changed = make(chan struct{})
		p.mutex.Unlock()
	}
}

// next returns what is closed when a file has changed after this call.
func (p *pods) next() <-chan struct{} {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.changed
}

func (p *pods) load(name podName) (*pod, error) {
	content, err := os.ReadFile(filepath.Join(p.folder, filepath.Base(name.name)+".json"))
	if err != nil {
		return nil, err
	}
	found := &pod{}
	if err := json.Unmarshal(content, found); err != nil {
		return nil, err
	}
	if found.Namespace != name.namespace {
		return nil, fmt.Errorf("no pod %s", name.id())
	}
	return found, nil
}

// running returns a container, and a context that ends with its process.
func (p *pods) running(ctx context.Context, id string) (*container, context.Context, context.CancelFunc, error) {
	parts := strings.SplitN(id, "/", 3)
	name := podName{parts[0], parts[1]}
	load := func() *container {
		if pod, err := p.load(name); err == nil {
			return pod.Containers[parts[2]]
		}
		return nil
	}
	next := p.next()
	found := load()
	if found == nil || found.PID == 0 {
		return nil, nil, nil, fmt.Errorf("container %s does not run", id)
	}
	alive := func() bool {
		now := load()
		return now != nil && now.PID == found.PID
	}
	ctx, cancel := p.whileTrue(ctx, next, alive)
	return found, ctx, cancel, nil
}

// present returns a pod, and a context that ends with it.
func (p *pods) present(ctx context.Context, id string) (*pod, context.Context, context.CancelFunc, error) {
	parts := strings.SplitN(id, "/", 2)
	name := podName{parts[0], parts[1]}
	next := p.next()
	found, err := p.load(name)
	if err != nil {
		return nil, nil, nil, err
	}
	alive := func() bool {
		now, err := p.load(name)
		return err == nil && now.UID == found.UID
	}
	ctx, cancel := p.whileTrue(ctx, next, alive)
	return found, ctx, cancel, nil
}

func (p *pods) whileTrue(
	ctx context.Context, next <-chan struct{}, alive func() bool,
) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		for {
			select {
			case <-ctx.Done():
				return
			case <-next:
				next = p.next()
				if !alive() {
					return
				}
			}
		}
	}()
	return ctx, cancel
}
