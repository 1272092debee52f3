"""From the evidence back to the module tree: what gives way, and the edit itself, on a copy."""
