"""What a launch costs, and what the machine can do at best."""
