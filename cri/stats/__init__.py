"""What containers and pods use, as the CRI tells it."""
