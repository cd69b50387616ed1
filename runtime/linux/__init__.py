"""The kernel's interfaces, one file each: the only place that uses ctypes.

Importable by the zygote: standard library only.
"""
