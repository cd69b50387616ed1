"""crib as its users use it: whole programs against a daemon of their own."""
