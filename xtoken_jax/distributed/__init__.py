"""Several processes and devices as one run: meshes, agreement, heartbeats, checksums."""
