"""The engine room: runs OCI specs and keeps images; knows nothing of Kubernetes or gRPC."""
