"""What one iteration is: traced, and plain."""
