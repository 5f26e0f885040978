"""How good a bundle is, on the public held-out set: `backline bench quality`."""
