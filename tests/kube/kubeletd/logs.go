package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"

	"github.com/fsnotify/fsnotify"
)

// serveLogs answers as a kubelet does, as far as a container's file of bytes without times allows.
func (p *pods) serveLogs(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	for _, other := range []string{"previous", "timestamps", "sinceSeconds", "sinceTime"} {
		if query.Has(other) {
			http.Error(w, other+" is not played", http.StatusBadRequest)
			return
		}
	}
	tail, errTail := number(query.Get("tailLines"))
	limit, errLimit := number(query.Get("limitBytes"))
	stream := query.Get("stream")
	if errTail != nil || errLimit != nil || (stream != "" && stream != "All") {
		http.Error(w, `{"message": "Invalid request."}`, http.StatusUnprocessableEntity)
		return
	}
	name := podName{r.PathValue("namespace"), r.PathValue("pod")}
	found, err := p.load(name)
	if err != nil {
		http.Error(w, fmt.Sprintf("pod %q does not exist", name.name), http.StatusNotFound)
		return
	}
	container := found.Containers[r.PathValue("container")]
	if container == nil {
		text := fmt.Sprintf("container %q in pod %q is waiting to start: ContainerCreating", r.PathValue("container"), name.name)
		http.Error(w, text, http.StatusBadRequest)
		return
	}
	file, err := os.Open(container.Log)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer file.Close()
	if err := seekTail(file, tail); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	var out io.Writer = flushing{w, http.NewResponseController(w)}
	if limit >= 0 {
		_, _ = io.CopyN(out, file, limit)
		return
	}
	ctx := r.Context()
	if query.Get("follow") == "true" {
		_, running, cancel, err := p.running(ctx, name.id()+"/"+r.PathValue("container"))
		if err == nil {
			defer cancel()
			_ = follow(running, file, out)
			return
		}
	}
	_, _ = io.Copy(out, file)
}

// number returns -1 for nothing.
func number(text string) (int64, error) {
	if text == "" {
		return -1, nil
	}
	found, err := strconv.ParseInt(text, 10, 64)
	if err == nil && found < 0 {
		err = fmt.Errorf("%d is less than 0", found)
	}
	return found, err
}

// seekTail sets the position before the last lines, or before all if they are -1.
func seekTail(file *os.File, lines int64) error {
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil || lines == 0 {
		return err
	}
	var position int64
	block := make([]byte, 32<<10)
	// The end of the last line, if it has one, is none between lines.
	for end--; lines > 0 && end > 0; {
		part := block[:min(end, int64(len(block)))]
		end -= int64(len(part))
		if _, err := file.ReadAt(part, end); err != nil {
			return err
		}
		for at := bytes.LastIndexByte(part, '\n'); at >= 0; at = bytes.LastIndexByte(part[:at], '\n') {
			if lines--; lines == 0 {
				position = end + int64(at) + 1
				break
			}
		}
	}
	_, err = file.Seek(position, io.SeekStart)
	return err
}

// follow copies what is in a file and what comes into it, until the context ends; then what is there still.
func follow(ctx context.Context, file *os.File, out io.Writer) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close()
	if err := watcher.Add(file.Name()); err != nil {
		return err
	}
	for {
		if _, err := io.Copy(out, file); err != nil {
			return err
		}
		select {
		case <-watcher.Events:
		case <-ctx.Done():
			_, err := io.Copy(out, file)
			return err
		}
	}
}

// flushing sends each piece at once.
type flushing struct {
	http.ResponseWriter
	controller *http.ResponseController
}

func (f flushing) Write(data []byte) (int, error) {
	n, err := f.ResponseWriter.Write(data)
	if err != nil {
		return n, err
	}
	return n, f.controller.Flush()
}
