package suite

import (
	"runtime"
	"sync"
)

var spawner struct {
	once sync.Once
	work chan func()
}

func spawnLoop() {
	runtime.LockOSThread()
	for f := range spawner.work {
		f()
	}
}
