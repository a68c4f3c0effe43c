"""The virtio console: configuration, control dialogue, ports."""
