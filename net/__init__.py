"""The network room: from a namespace path and a pod's identity to addresses."""
