"""The program that unpacks one layer: hostile bytes in, a directory in overlay form out.

It runs in a process of its own, started per layer by `runtime.images.layers`, and imports only the standard library,
the decompressors and `runtime.linux`.
"""
