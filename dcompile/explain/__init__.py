"""What the compiler did, in words and drawn."""
