"""Training: what is frozen, at which rates the rest learns, the loop, and checkpoints that survive anything."""
