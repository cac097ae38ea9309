// Command gojson reads JSON values, one a line, as Kubernetes reads an object of a kind that it does not know, and writes
// each as Go does, without what add-on managers leave out of the hash of a configuration, with the hash before it.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log"
	"os"

	kjson "k8s.io/apimachinery/pkg/util/json"
)

func main() {
	in := bufio.NewReader(os.Stdin)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		object := map[string]interface{}{}
		if err := kjson.Unmarshal(line, &object); err != nil {
			log.Fatalf("%s: %v", line, err)
		}
		for _, field := range []string{"apiVersion", "kind", "metadata", "status"} {
			delete(object, field)
		}
		text, err := json.Marshal(object)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Fprintf(out, "%x %s\n", sha256.Sum256(text), text)
	}
}
