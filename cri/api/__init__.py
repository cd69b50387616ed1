"""The messages and services on cribd's socket, generated from proto/ by hack/update-proto.

`cri.api.cri_pb2` is the CRI v1 (package runtime.v1, from proto/cri/api/v1/api.proto), `cri.api.crib_pb2` crib's own
service (package crib.v1, from proto/crib/v1/crib.proto). There are no generated stubs: callers and servers take the
methods from `DESCRIPTOR.services_by_name`.
"""
