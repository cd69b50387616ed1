"""The benchmark behind `hack/bench`: any CRI sockets, one client, one run, with the kernel's floor beside them."""
