"""What happens to the optimizer: it follows changes in place, and its learning rate is scaled."""
