// Renders a chart as "helm template" does, with many sets of values in one process.
//
// Its argument is the chart's folder. A line of standard input is a set of values and the namespace, as JSON; the line of
// standard output that answers it has either the objects or the error.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"os"
	"strings"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/releaseutil"
	"sigs.k8s.io/yaml"
)

type order struct {
	Namespace string                 `json:"namespace"`
	Values    map[string]interface{} `json:"values"`
}

type answer struct {
	Objects []interface{} `json:"objects"`
	Error   string        `json:"error"`
}

func main() {
	log.SetFlags(0)
	in := bufio.NewReader(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) == 0 {
			return
		}
		var asked order
		if err := json.Unmarshal(line, &asked); err != nil {
			log.Fatal(err)
		}
		objects, failure := render(os.Args[1], asked)
		told := answer{Objects: objects}
		if failure != nil {
			told.Error = failure.Error()
		}
		if err := out.Encode(told); err != nil {
			log.Fatal(err)
		}
		if err != nil {
			return
		}
	}
}

func render(folder string, asked order) ([]interface{}, error) {
	// Rendering changes a chart, so each gets its own.
	chart, err := loader.Load(folder)
	if err != nil {
		return nil, err
	}
	install := action.NewInstall(new(action.Configuration))
	install.DryRun = true
	install.ClientOnly = true
	install.ReleaseName = "cluster-proxy"
	install.Namespace = asked.Namespace
	install.KubeVersion = &chartutil.KubeVersion{Version: "v1.31.0", Major: "1", Minor: "31"}
	release, err := install.Run(chart, asked.Values)
	if err != nil {
		return nil, err
	}
	objects := []interface{}{}
	for _, manifest := range releaseutil.SplitManifests(release.Manifest) {
		if strings.TrimSpace(manifest) == "" {
			continue
		}
		var object interface{}
		if err := yaml.Unmarshal([]byte(manifest), &object); err != nil {
			return nil, err
		}
		objects = append(objects, object)
	}
	return objects, nil
}
