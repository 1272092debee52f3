"""What a model computes on example inputs: one graph of ATen calls, and what in it is constant."""
