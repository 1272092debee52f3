"""Zero padding between two forms: where composing them is not exact, and what makes it exact."""
