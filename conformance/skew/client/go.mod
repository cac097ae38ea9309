// The older releases have .mod files of their own; this one keeps the folder out of the module above it.
module clusterproxy-conformance-client

go 1.24.7
