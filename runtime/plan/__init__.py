"""Plans: a flat list of small steps between an OCI spec and the kernel. See `steps` and `compile`.

`plan`, `steps`, `mounts` and `identity` are importable by the zygote: standard library only.
"""
