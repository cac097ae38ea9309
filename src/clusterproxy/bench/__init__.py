"""A load for tunnels, and what comes of it: ``clusterproxy bench`` without the terminal."""
