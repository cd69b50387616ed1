"""The `crib` command: a client of cribd's socket like any other.

It talks CRI, and crib's own small service for what the CRI has no call for. Nothing here reads cribd's files except
the container's log, whose path cribd tells.
"""
