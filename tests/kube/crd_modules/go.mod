module clusterproxy-crds

go 1.26.0

// Not imported: tests/kube/crds.py takes the CRDs out of its files.
require open-cluster-management.io/api v1.3.0
