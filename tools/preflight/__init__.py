"""What the agents of an attempt make sure of before Ray starts."""
