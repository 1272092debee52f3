"""What operators and layers cost: predicted by a roofline, or measured on this machine."""
