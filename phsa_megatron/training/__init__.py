"""The training room: loop, optimizer, state, checkpoints, signals, stages."""
