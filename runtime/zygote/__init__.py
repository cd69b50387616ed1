"""The processes that outlive cribd: a zygote that forks monitors, a monitor per pod, and their children.

Standard library only, one thread each, no asyncio. `launch` is cribd's side.
"""
