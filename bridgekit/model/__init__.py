"""Source states to a message to the target: the pair, the bridge, the losses and the decode loop."""
