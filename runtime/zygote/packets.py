"""What passes between cribd and a monitor while a client is attached: packets of a SEQPACKET socket, a tag first.

A packet is taken whole or not at all, so that neither side keeps half of one. The end of the socket is the end of
the attachment, from either side.
"""

STDIN = b"\x00"  # cribd → monitor: input; without any, its end
STDOUT = b"\x01"  # monitor → cribd: output
STDERR = b"\x02"
LOST = b"\x03"  # monitor → cribd: so many bytes of output, in decimal, were not kept for a client that doesn't read
END = b"\x04"  # monitor → cribd: the container has ended, and nothing was lost since the last LOST
DATA_BYTES = 65536  # what a packet carries at most
