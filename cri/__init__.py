"""The API room: serves the Kubernetes CRI, and is the only one that knows gRPC, protobuf and Kubernetes."""
