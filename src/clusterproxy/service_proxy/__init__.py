"""The service proxy: on a managed cluster, between the tunnel and the cluster's apiserver and services."""
